"""Train a ConViT or DeiT: python train.py --config=configs/convit_s.py --workdir=runs/mine."""

import os
import sys
from pathlib import Path

from absl import flags

from convit_jax.cli import config_name, launch
from convit_jax.progress import outlive_readers

SUMMARY = """\
Done: top-1 {val_top1:.2f}  top-5 {val_top5:.2f}  loss {val_loss:.4f}
  checkpoints  {workdir}/checkpoints (latest and best)
  curves       {curves}
  TensorBoard  tensorboard --logdir={workdir}/tensorboard (after pip install tensorboard)
  next         your own images: {python} train.py --config=configs/convit_ti.py \
--config.init_from=convit_tiny --config.data.name=folder --config.data.dir=FOLDER with \
FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg"""


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Run directory; by default runs/NAME of the config file.")


def main(arguments: list[str]) -> None:
    """Trains what the flags describe, draws the learning curves and prints a summary."""
    from convit_jax.figures.curves import draw_curves
    from convit_jax.training.distributed import is_first
    from convit_jax.training.loop import train

    outlive_readers()
    workdir = Path(flags.FLAGS.workdir or f"runs/{config_name('configs/digits.py')}").expanduser()
    last = train(flags.FLAGS.config, workdir)
    if is_first():
        curves = draw_curves(workdir, workdir)[0]
        if last:
            python = os.path.relpath(sys.executable)
            print(SUMMARY.format(workdir=workdir, curves=curves, python=python, **last))


if __name__ == "__main__":
    launch(
        "train.py",
        main,
        define=_define_flags,
        config="configs/digits.py",
        processes=True,
        # Outside the loop, or after a second Ctrl-C.
        interrupted="interrupted. Saved checkpoints are kept; run the same command to continue.",
    )
