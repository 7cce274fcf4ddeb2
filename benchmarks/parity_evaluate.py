"""Top-1, top-5 and loss of the same weights on the same photos: convit_jax.evaluate against timm's transform.

    python -m benchmarks.parity_evaluate --peer=PYTHON --images=FOLDER

PYTHON: as for benchmarks.parity. FOLDER: an image folder, FOLDER/train/CLASS/* and FOLDER/val/CLASS/*. The
network is convit_tiny with random weights and a head fitted to half of the validation photos by ridge
regression, so that the numbers are neither chance nor perfect.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx

from convit_jax.data.augment import normalize
from convit_jax.data.examples import EvalExample
from convit_jax.data.sources import ImageFolder
from convit_jax.models.variants import abstract_model, initial_params, model_settings
from convit_jax.weights.formats import Preprocessing
from convit_jax.weights.names import to_state_dict
from convit_jax.weights.writer import write

PEER = flags.DEFINE_string("peer", None, "A Python with torch and timm.", required=True)
IMAGES = flags.DEFINE_string("images", None, "Image folder.", required=True)

# python -c SCRIPT WEIGHTS FOLDER/train FOLDER/val. Labels are places among the classes of train.
SCRIPT = """
import os, sys, torch
try: import timm_here
except ImportError: pass
import timm, timm.data
from torchvision.datasets import ImageFolder
weights, train, val = sys.argv[1:]
classes = sorted(os.listdir(train))
model = timm.create_model("convit_tiny", num_classes=len(classes)).eval()
model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
data = ImageFolder(val, transform)
data.target_transform = lambda label: classes.index(data.classes[label])
loader = torch.utils.data.DataLoader(data, batch_size=16)
top1 = top5 = loss = images = 0
with torch.no_grad():
    for batch, labels in loader:
        logits = model(batch)
        hits = logits.topk(5).indices == labels[:, None]
        top1, top5, images = top1 + hits[:, 0].sum().item(), top5 + hits.sum().item(), images + len(labels)
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
top1, top5 = 100 * top1 / images, 100 * top5 / images
print(f"top-1 {top1:.3f}  top-5 {top5:.3f}  loss {loss / images:.3f}  images {images}")
"""


def main(_):
    logging.set_verbosity(logging.WARNING)
    source = ImageFolder(IMAGES.value, "test")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        write(weights, fitted(source))
        data = ["--config.data.name=folder", f"--config.data.dir={IMAGES.value}", "--config.data.workers=0"]
        config = ["--config=configs/convit_ti.py", "--config.eval_batch_size=32", *data]
        ours = [sys.executable, "-m", "convit_jax.evaluate", f"--checkpoint={weights}", *config]
        theirs = [PEER.value, "-c", SCRIPT, str(weights), str(source.root.parent / "train"), str(source.root)]
        for who, command in (("convit_jax", ours), ("timm", theirs)):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            print(f"{who:12}{done.stdout.strip().splitlines()[-1]}", flush=True)


def fitted(source):
    """State dict of convit_tiny with random weights and a head fitted to every other image of a source."""
    settings = model_settings("convit_tiny", num_classes=len(source.class_names))
    graphdef, _ = abstract_model(settings)
    params, how = initial_params(settings, 0), Preprocessing()
    features_of = jax.jit(
        lambda params, images: nnx.merge(graphdef, params).features(normalize(images, how.mean, how.std))
    )
    indices = np.arange(0, len(source), 2)
    example = EvalExample(source, indices, settings["image_size"], how.crop_ratio)
    batches = [example(range(first, first + 16)) for first in range(0, len(indices), 16)]
    features = np.concatenate([features_of(params, batch["image"]) for batch in batches])[: len(indices)]
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    targets = np.eye(len(source.class_names))[source.labels[indices]]
    solution = 10 * np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T @ targets)
    tensors = to_state_dict(params)
    tensors["head.weight"] = solution[:-1].T.astype(np.float32)
    tensors["head.bias"] = solution[-1].astype(np.float32)
    return tensors


if __name__ == "__main__":
    app.run(main)
