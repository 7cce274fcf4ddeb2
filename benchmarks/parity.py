"""Compares logits, exports and evaluation with timm, on the same weights and images.

    python -m benchmarks.parity --peer=PYTHON [--models=convit_tiny,...] [--images=FOLDER]

PYTHON is an interpreter with PyTorch and timm. For each model the peer saves random weights (gates and
positional projections included) and timm's float32 logits of four random images. They are loaded and compared
here, exported as .safetensors, loaded by timm with strict=True and compared again.

FOLDER is an image folder, FOLDER/train/CLASS/* and FOLDER/val/CLASS/*. With it the accuracy of convit_tiny
with random weights is compared: timm with its own transform, then convit_jax.evaluate. A ridge regression
fits the head to every other validation image, so that the accuracy is neither chance nor perfect.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import convit_jax

MODELS = (
    "convit_tiny",
    "convit_small",
    "convit_base",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_small_distilled_patch16_224",
)
LIMIT = 1e-4  # of the largest difference between logits

# What the peer runs: python -c SCRIPT ARGUMENTS.
IMPORTS = """
import os, sys, numpy as np
try: import timm_here  # for a build of PyTorch without torchvision's operators
except ImportError: pass
import timm, timm.data, torch
torch.manual_seed(0)
torch.set_grad_enabled(False)
def random_model(name, **settings):
    model = timm.create_model(name, **settings).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model
"""
WRITE = """
name, weights, arrays = sys.argv[1:]
model, images = random_model(name), torch.randn(4, 3, 224, 224)
torch.save(model.state_dict(), weights)
np.savez(arrays, images=images.numpy(), logits=model(images).numpy())
"""
READ_BACK = """
from safetensors.torch import load_file
name, weights, arrays = sys.argv[1:]
model, arrays = timm.create_model(name).eval(), np.load(arrays)
model.load_state_dict(load_file(weights), strict=True)
print(np.abs(model(torch.from_numpy(arrays["images"])).numpy() - arrays["logits"]).max())
"""
EVALUATE = """
from torchvision.datasets import ImageFolder
weights, folder = sys.argv[1:]
classes = sorted(os.listdir(f"{folder}/train"))
model = random_model("convit_tiny", num_classes=len(classes))
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
data = ImageFolder(f"{folder}/val", transform)
features, labels = [], []
for images, found in torch.utils.data.DataLoader(data, batch_size=16):
    features.append(model.forward_head(model.forward_features(images), pre_logits=True))
    labels += [classes.index(data.classes[label]) for label in found]
features, labels = torch.cat(features), torch.tensor(labels)
design = torch.cat([features, torch.ones(len(features), 1)], 1)[::2].double()
targets = torch.nn.functional.one_hot(labels[::2], len(classes)).double()
solution = 10 * torch.linalg.solve(design.T @ design + torch.eye(design.shape[1]), design.T @ targets)
model.head.weight.add_(solution[:-1].T)  # the random part breaks ties
model.head.bias.add_(solution[-1])
torch.save(model.state_dict(), weights)
logits = model.head(features)
hits = (logits.topk(5).indices == labels[:, None]).double()
top1, top5 = 100 * hits[:, 0].mean(), 100 * hits.sum(1).mean()
loss = torch.nn.functional.cross_entropy(logits, labels)
print(f"top-1 {top1:.3f}  top-5 {top5:.3f}  loss {loss:.3f}  images {len(labels)}")
"""


def run(*command):
    """Returns the last line that a command prints, or ""."""
    return subprocess.check_output([*map(str, command)], text=True).strip().rpartition("\n")[2]


def compare(name, peer, folder):
    """Prints how far a model is from timm's; returns the largest difference of logits."""
    weights, arrays, exported = folder / "weights.pth", folder / "arrays.npz", folder / "back.safetensors"
    run(peer, "-c", IMPORTS + WRITE, name, weights, arrays)
    with np.load(arrays) as io:
        images, expected = io["images"].transpose(0, 2, 3, 1), io["logits"]
    graphdef, state = nnx.split(convit_jax.load_pretrained(weights))
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)
    difference = float(np.abs(logits - expected).max())
    run(sys.executable, "-m", "convit_jax.convert", "--overwrite", weights, exported)
    back = float(run(peer, "-c", IMPORTS + READ_BACK, name, exported, arrays))
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    print(f"{name:34}{count:>12,}{difference:>16.1e}{np.abs(expected).max():>10.2f}{back:>16.1e}", flush=True)
    return max(difference, back)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="a Python with PyTorch and timm")
    parser.add_argument("--models", default=",".join(MODELS), help="of timm")
    parser.add_argument("--images", help="image folder for comparing evaluation")
    options = parser.parse_args()
    worst = 0.0
    print(f"{'model':34}{'parameters':>12}{'logits within':>16}{'of':>10}{'export within':>16}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            worst = max(worst, compare(name, options.peer, Path(folder)))
        if options.images:
            weights = Path(folder) / "fitted.pth"
            print(f"timm        {run(options.peer, '-c', IMPORTS + EVALUATE, weights, options.images)}")
            command = [sys.executable, "-m", "convit_jax.evaluate", f"--checkpoint={weights}"]
            command += ["--config=configs/convit_ti.py", "--config.eval_batch_size=32"]
            command += ["--config.data.name=folder", f"--config.data.dir={options.images}"]
            print(f"convit_jax  {run(*command)}")
    if worst > LIMIT:
        sys.exit(f"logits differ by {worst:.1e}, more than {LIMIT:.0e}")


if __name__ == "__main__":
    main()
