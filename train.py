"""Train a ConViT or DeiT: python train.py --config=configs/convit_s.py --workdir=runs/mine."""

import os
import sys
from pathlib import Path

from absl import flags

from convit_jax.cli import launch, source_name
from convit_jax.config import take_option
from convit_jax.progress import outlive_readers

DEFAULT = "configs/digits.py"
SUMMARY = """\
Done: top-1 {val_top1:.2f}  top-5 {val_top5:.2f}  loss {val_loss:.4f}
  checkpoints  {workdir}/checkpoints (the latest, and the best: top-1 {best:.2f} at step {best_step})
  curves       {curves}
  TensorBoard  tensorboard --logdir={workdir}/tensorboard (after pip install tensorboard)
  evaluate     {python} -m convit_jax.evaluate --checkpoint={workdir}  # the best checkpoint
  predict      {python} -m convit_jax.predict --checkpoint={workdir} PHOTO.jpg
  visualize    {python} -m convit_jax.visualize --checkpoint={workdir} --image=0 --output={workdir}/maps
  convert      {python} -m convit_jax.convert {workdir} {workdir}/weights.safetensors  # for PyTorch and timm"""


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Run directory; by default runs/NAME of the config file.")


def main(arguments: list[str]) -> None:
    """Trains what the flags describe, draws the learning curves and prints a summary."""
    from convit_jax.figures.curves import draw_curves
    from convit_jax.rundir import read_scores
    from convit_jax.training.distributed import is_first
    from convit_jax.training.loop import train
    from convit_jax.weights.run import find_step

    outlive_readers()
    given, _ = take_option(sys.argv, "config")
    workdir = Path(flags.FLAGS.workdir or f"runs/{source_name(given or DEFAULT)}").expanduser()
    last = train(flags.FLAGS.config, workdir)
    if is_first():
        curves = draw_curves(workdir, workdir)[0]
        if last:
            step, python = find_step(workdir, "best", ema=False), os.path.relpath(sys.executable)
            best = read_scores(workdir / "metrics.jsonl", "val_top1")[step]
            print(SUMMARY.format(workdir=workdir, curves=curves, python=python, best=best, best_step=step, **last))


if __name__ == "__main__":
    launch(
        "train.py",
        main,
        define=_define_flags,
        config=DEFAULT,
        processes=True,
        # Outside the loop, or after a second Ctrl-C.
        interrupted="interrupted. Saved checkpoints are kept; run the same command to continue.",
    )
