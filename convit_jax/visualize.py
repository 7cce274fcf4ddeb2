"""Pictures of what a training sees.

python -m convit_jax.visualize --augmentations --config=configs/convit_ti.py --output=augmented.png
"""

from pathlib import Path

from absl import flags

from convit_jax.commands import launch
from convit_jax.errors import UserError


def define():
    flags.DEFINE_bool("augmentations", False, "Draw training images as the training step sees them.")
    flags.DEFINE_string("output", None, "The picture, or a folder for it.")


def main(_):
    """Draw what the flags ask for and say where it is."""
    from convit_jax.analysis.montage import augmentation_montage
    from convit_jax.training.plan import make_plan

    if not flags.FLAGS.augmentations:
        raise UserError("say what to draw: --augmentations.")
    if flags.FLAGS.output is None:
        raise UserError("say where to draw it: --output=FILE.png.")
    config, path = flags.FLAGS.config, Path(flags.FLAGS.output).expanduser()
    if path.is_dir() or not path.suffix:
        path = path / "augmentations.png"
    plan = make_plan(config, devices=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent} ({error}): give another --output.") from error
    augmentation_montage(config, plan, path)
    print(path)


if __name__ == "__main__":
    launch("visualize", main, define=define, config="configs/digits.py")
