"""Train a ConViT or DeiT: python train.py --config=configs/convit_s.py --workdir=runs/mine."""

from absl import flags

from convit_jax.cli import config_name, launch


def define():
    flags.DEFINE_string("workdir", None, "Run directory; by default runs/NAME of the config file.")


def main(_):
    """Train what the flags say."""
    from convit_jax.training.loop import train

    workdir = flags.FLAGS.workdir or f"runs/{config_name('configs/digits.py')}"
    train(flags.FLAGS.config, workdir)


if __name__ == "__main__":
    launch(
        "train.py",
        main,
        define=define,
        config="configs/digits.py",
        processes=True,
        # Before the loop takes signals over, or the second one.
        interrupted="interrupted; what was saved stays, the same command continues.",
    )
