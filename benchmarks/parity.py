"""The same weights in timm and here: how far logits are apart, and whether exports load into timm strictly.

    python -m benchmarks.parity --peer=PYTHON [--models=convit_tiny,...]

PYTHON: an interpreter with torch and timm; this one needs neither. For each model the peer writes random
weights (every parameter, gates and positional projections included) as torch.save does, and timm's float32
logits of four random images; they are read here, compared and written back as .safetensors, which the peer
loads with strict=True and compares again.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx

from convit_jax.weights.formats import write_safetensors
from convit_jax.weights.pretrained import load

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
PEER = flags.DEFINE_string("peer", None, "A Python with torch and timm.", required=True)
NAMES = flags.DEFINE_list("models", list(MODELS), "Models of timm.")

# What the peer runs: python -c WRITER DIR MODEL, then python -c CHECKER DIR MODEL.
WRITER = """
import sys, numpy as np
try: import timm_here  # beside a build of PyTorch that misses torchvision's operators
except ImportError: pass
import timm, torch
folder, name = sys.argv[1:]
torch.manual_seed(0)
model = timm.create_model(name).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save(model.state_dict(), f"{folder}/weights.pth")
    images = torch.randn(4, 3, 224, 224)
    np.savez(f"{folder}/io.npz", images=images.numpy(), logits=model(images).numpy())
"""
CHECKER = """
import sys, numpy as np
try: import timm_here
except ImportError: pass
import timm, torch
from safetensors.torch import load_file
folder, name = sys.argv[1:]
io = np.load(f"{folder}/io.npz")
model = timm.create_model(name).eval()
model.load_state_dict(load_file(f"{folder}/back.safetensors"), strict=True)
with torch.no_grad():
    difference = np.abs(model(torch.from_numpy(io["images"])).numpy() - io["logits"]).max()
print(f"loaded strictly, largest difference {difference:.1e}", end="  ")
"""


def main(_):
    logging.set_verbosity(logging.WARNING)
    print(f"{'model':34}{'parameters':>12}  {'logits within':14}{'of':8}exports in timm")
    worst = 0.0
    for name in NAMES.value:
        with tempfile.TemporaryDirectory() as folder:
            worst = max(worst, compare(name, Path(folder)))
    if worst > LIMIT:
        sys.exit(f"logits differ by {worst:.1e}, more than {LIMIT:.0e}")


def compare(name, folder):
    """Largest difference between timm's logits and ours for a model, printed with what the exports gave."""
    peer(WRITER, folder, name)
    loaded = load(folder / "weights.pth")
    graphdef, _ = loaded.network
    with np.load(folder / "io.npz") as io:
        images, expected = io["images"].transpose(0, 2, 3, 1), io["logits"]
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda params: nnx.merge(graphdef, params)(images))(loaded.params())
    difference = float(np.abs(logits - expected).max())
    write_safetensors(folder / "back.safetensors", loaded.tensors)
    count = sum(tensor.size for tensor in loaded.tensors.values())
    said = peer(CHECKER, folder, name)
    print(f"{name:34}{count:>12,}  {difference:<14.1e}{np.abs(expected).max():<8.2f}{said}", flush=True)
    return difference


def peer(script, *arguments):
    """Run a script in the peer's Python: its output."""
    done = subprocess.run([PEER.value, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    app.run(main)
