"""Convert PyTorch's weights to this package's and back, without PyTorch.

    python -m convit_jax.convert convit_small.pth weights/convit_small
    python -m convit_jax.convert convit_small weights/convit_small      # published, from the Hub
    python -m convit_jax.convert runs/convit_s mine.safetensors         # for PyTorch and timm
    python -m convit_jax.convert runs/convit_s mine --for=timm          # timm.create_model("local-dir:mine", ...)

SOURCE: .pth, .pt, .bin, .safetensors, a converted directory, a run directory, a Hub id, or the authors' name of
a model. TARGET: a directory, or a file that ends in .safetensors.
"""

from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.errors import UserError
from convit_jax.rundir import disk_errors


def _define_flags() -> None:
    define_weights(checkpoint=False)
    flags.DEFINE_integer("num_classes", None, "Replace the head by a new one with this many classes.")
    flags.DEFINE_integer("seed", 0, "Seed of the new head.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing TARGET.")
    flags.DEFINE_enum("for", None, ["timm"], "Write a directory that timm and the Hub load, with a model card.")


def main(arguments: list[str]) -> None:
    """Converts SOURCE to TARGET."""
    from convit_jax.weights.formats import check_target, save_converted, save_for_timm
    from convit_jax.weights.pretrained import describe_weights

    source, target = arguments[0], Path(arguments[1]).expanduser()
    occupied = any(target.iterdir()) if target.is_dir() else target.exists()
    if occupied and not flags.FLAGS.overwrite:
        raise UserError(f"{target} exists: give another TARGET, or add --overwrite to replace it.")
    check_target(target)
    if target.suffix == ".safetensors" and flags.FLAGS["for"].value:
        raise UserError(f"--for=timm writes a directory: name it {target.with_suffix('')}.")
    loaded = load_weights(source, num_classes=flags.FLAGS.num_classes, seed=flags.FLAGS.seed)
    named = "with" if loaded.class_names else "without"
    images = f"for images with {loaded.preprocessing}; {named} names of classes"
    print("\n".join([describe_weights(loaded), *loaded.changes, images]), flush=True)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        (save_for_timm if flags.FLAGS["for"].value else save_converted)(loaded, target)
    print(f"Written to {target}")


if __name__ == "__main__":
    launch("convert", main, define=_define_flags, arguments="SOURCE TARGET")
