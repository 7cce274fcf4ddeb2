"""Convert weights between PyTorch and this package, without PyTorch.

    python -m convit_jax.convert convit_small.pth weights/convit_small
    python -m convit_jax.convert convit_small weights/convit_small      # published, from the Hub
    python -m convit_jax.convert runs/convit_s mine.pth                 # the way back

SOURCE: .pth, .pt, .safetensors, a converted directory, a run directory, a Hub id, or the authors' name of
a model. TARGET: a directory, or a file that ends in .pth, .pt or .safetensors, which PyTorch, timm and the
authors' code load.
"""

import time
from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.errors import UserError

FILES = (".pth", ".pt", ".safetensors")
OTHERS = (".bin", ".ckpt", ".h5", ".npz", ".onnx", ".pkl", ".tar")  # no names of directories, rather mistakes
DIRECTORY = {"weights.safetensors", "config.json"}  # what a converted one holds


def define():
    define_weights(checkpoint=False, new_head=True)
    flags.DEFINE_bool("overwrite", False, "Replace a TARGET that exists.")


def main(arguments):
    """Convert SOURCE to TARGET."""
    from convit_jax.weights.architecture import told_heads
    from convit_jax.weights.formats import save
    from convit_jax.weights.pretrained import describe
    from convit_jax.weights.writer import write

    if len(arguments) != 2:
        raise UserError(f"give SOURCE and TARGET, not {len(arguments)} arguments; --help explains them.")
    source, target = arguments[0], Path(arguments[1]).expanduser()
    check_target(target, flags.FLAGS.overwrite)
    to_file = target.suffix in FILES
    if to_file and flags.FLAGS.dtype:
        raise UserError(
            f"--dtype is what a converted directory is run in; {target} would keep the numbers as they are: "
            "leave it out, or give a directory."
        )
    began = time.monotonic()
    loaded = load_weights(source)
    print("\n".join([describe(loaded), *loaded.changes]), flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if to_file:
            write(target, loaded.tensors)
        else:
            save(loaded, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror}): make room, or check the path and its permissions."
        ) from error
    kind = "" if to_file else "the directory "
    print(f"Written to {kind}{target} in {time.monotonic() - began:.1f} s")
    heads = loaded.settings["num_heads"]
    if to_file and told_heads(loaded.settings) != heads:
        print(
            f"The file does not tell that it has {heads} heads: say so to what reads it, here with "
            f"--heads={heads}."
        )


def check_target(target, overwrite):
    """Refuse a target that is not asked to be replaced, or that is not of our making."""
    if target.suffix in OTHERS:
        raise UserError(f"{target} ends in {target.suffix}: give a directory, a .pth or a .safetensors.")
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} exists: give another TARGET, or add --overwrite to replace it.")
    if target.is_dir() and (target.suffix in FILES or {path.name for path in target.iterdir()} - DIRECTORY):
        raise UserError(f"{target} holds other things than converted weights: give another TARGET.")
    if target.is_file() and target.suffix not in FILES:
        raise UserError(f"{target} is a file: give a directory, a .pth or a .safetensors.")


if __name__ == "__main__":
    launch("convert", main, define=define, arguments="SOURCE TARGET")
