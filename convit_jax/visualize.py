"""Pictures of what a network looks at, and of what a training sees.

    python -m convit_jax.visualize --checkpoint=PATH --image=photo.jpg --output=DIR [--query=ROW,COLUMN]
    python -m convit_jax.visualize --init --config=configs/convit_s.py [--image=photo.jpg] --output=DIR
    python -m convit_jax.visualize --run=RUN --output=DIR
    python -m convit_jax.visualize --augmentations --config=configs/convit_ti.py --output=augmented.png

The first draws attention maps of every layer and head, the second those of a GPSA layer before training
(Fig. 3; with --checkpoint in place of --config, of that model and, of a run, its seed), the third learning
curves, gates and non-locality through training (Figs. 5, 6). An image is a file, or a number: that image of
the test split of the run's own data, or of --config's.
"""

import re
from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights, required_config
from convit_jax.config import load_run_config
from convit_jax.errors import UserError
from convit_jax.rundir import is_run

OF_WEIGHTS = ("checkpoint", "image_size", "heads", "which", "dtype", "ema")


def define():
    flags.DEFINE_bool("augmentations", False, "Draw training images as the training step sees them.")
    flags.DEFINE_bool("init", False, "Draw the attention of a GPSA layer before training (Fig. 3).")
    flags.DEFINE_string(
        "run", None, "Draw learning curves, gates and non-locality of the training in this run directory."
    )
    flags.DEFINE_string("image", None, "An image file, or the number of an image of the test split.")
    flags.DEFINE_string(
        "query", None, "ROW,COLUMN of the patch whose attention is drawn, from 0; the centre."
    )
    flags.DEFINE_string("output", None, "Folder for the pictures.")
    define_weights()


def main(_):
    """Draw what the flags ask for and say where it is."""
    draw, values = choose(), flags.FLAGS
    if values.output is None:
        raise UserError("say where to draw it: --output=DIR.")
    for path in draw(Path(values.output).expanduser()):
        print(path)


def choose():
    """The function that draws what the flags ask for.

    Raises:
      UserError: they ask for nothing or for two things, or some would be ignored.
    """
    values = flags.FLAGS
    modes = {"augmentations": draw_augmentations, "init": draw_init, "run": draw_training}
    asked = [mode for mode in modes if values[mode].value]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are different pictures: ask for one at a time.")
    if not asked and not (values.checkpoint and values.image):
        raise UserError(
            "say what to draw: --checkpoint=PATH --image=IMAGE for attention maps, --init for the "
            "convolutional init, --run=DIR for learning curves, gates and non-locality, or --augmentations."
        )
    config = [name for name in values if re.match(r"config(\.|$)", name)]
    if asked == ["augmentations"]:
        read = config
    elif asked == ["run"]:
        read = []
    elif values.checkpoint is None:
        read = [*config, "image", "query"]
    else:  # a config for its images only
        read = [*(config if numbered() else []), "image", "query", *OF_WEIGHTS]
    for name in (*config, "image", "query", *OF_WEIGHTS):
        if values[name].present and name not in read:
            remedy = "leave it out"
            if asked == ["init"] and name in OF_WEIGHTS:
                remedy += ", add --checkpoint=PATH, or change the model with --config.model.FIELD=VALUE"
            drawing = asked[0] if asked else "checkpoint"
            raise UserError(f"--{name} would change nothing of what --{drawing} draws: {remedy}.")
    return modes[asked[0]] if asked else draw_attention


def draw_augmentations(path):
    """Training images after augmentation, into a file, or a folder's augmentations.png."""
    from convit_jax.figures.augmentations import augmentation_montage
    from convit_jax.training.plan import make_plan

    config = required_config()
    if path.is_dir() or not path.suffix:
        path = path / "augmentations.png"
    plan = make_plan(config, devices=1)
    make_folder(path.parent)
    augmentation_montage(config, plan, path)
    return [path]


def draw_training(directory):
    """Learning curves, gates and non-locality of a run, by epoch."""

    from convit_jax.figures.curves import draw_curves
    from convit_jax.figures.locality import draw_locality
    from convit_jax.models.variants import model_settings
    from convit_jax.rundir import read_metrics
    from convit_jax.training.plan import model_arguments

    run = Path(flags.FLAGS.run).expanduser()
    if not read_metrics(run / "metrics.jsonl") or not (run / "config.json").exists():
        raise UserError(
            f"{run} lacks config.json, or a line in metrics.jsonl: give the directory of a run that trains."
        )
    config = load_run_config(run)
    model = model_settings(**model_arguments(config, config.data.num_classes or 1000))
    return [*draw_curves(run, directory), *draw_locality(run, directory, model)]


def draw_attention(directory):
    """Attention maps of the weights for the image."""
    from convit_jax.analysis.maps import check_query, layer_maps
    from convit_jax.figures.maps import attention_pages

    loaded = load_weights()
    query = check_query(parse_query(flags.FLAGS.query), grid_of(loaded.settings))
    image, normalised = read_image(loaded.settings, loaded.preprocessing)
    make_folder(directory)
    return attention_pages(directory, layer_maps(loaded.model(), normalised, query), image, query)


def draw_init(directory):
    """The first GPSA layer of the weights' model, or of the config's, before training."""
    from convit_jax.analysis.maps import check_query, init_maps
    from convit_jax.figures.maps import init_page
    from convit_jax.models.variants import model_settings
    from convit_jax.training.plan import model_arguments
    from convit_jax.weights.formats import Preprocessing

    config = flags.FLAGS.config
    if flags.FLAGS.checkpoint:
        loaded = load_weights()
        settings, how = loaded.settings, loaded.preprocessing
        seed = config.seed if is_run(flags.FLAGS.checkpoint) else 0
    else:
        config = required_config()
        settings = model_settings(**model_arguments(config, config.data.num_classes or 1000))
        how = Preprocessing(config.data.crop_ratio, mean=config.data.mean, std=config.data.std)
        seed = config.seed
    query = check_query(parse_query(flags.FLAGS.query), grid_of(settings))
    image, normalised = read_image(settings, how) if flags.FLAGS.image else (None, None)
    alpha = settings["locality_strength"]
    strengths = (alpha / 2, alpha, 2 * alpha)
    content, positions = init_maps(settings, seed, query, strengths, normalised)
    make_folder(directory)
    return init_page(
        directory, content, positions, strengths if settings["conv_init"] else None, image, query
    )


def grid_of(settings):
    """(rows, columns) of patches."""
    return tuple(side // settings["patch_size"] for side in settings["image_size"])


def parse_query(text):
    """(row, column) of "3,4"; None of None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise UserError(f"--query is {text!r}: give ROW,COLUMN of a patch, as 3,4, counted from 0.")
    return int(match[1]), int(match[2])


def read_image(settings, how):
    """(uint8 [H, W, 3] as the network sees --image, the same normalised, float32)."""
    import jax

    from convit_jax.data.augment import normalize
    from convit_jax.data.images import centre_crop, decode
    from convit_jax.predict import read_bytes

    if settings["in_chans"] != 3:
        raise UserError(f"these weights take images of {settings['in_chans']} channels: pictures have 3.")
    given = flags.FLAGS.image
    record = test_image(int(given)) if numbered() else read_bytes(Path(given).expanduser())
    image = centre_crop(decode(record, given), settings["image_size"], how.crop_ratio, how.interpolation)
    return image, jax.device_get(normalize(image[None], how.mean, how.std))[0]


def numbered():
    """Whether --image is the number of an image."""
    given = flags.FLAGS.image
    return given is not None and given.isdigit() and not Path(given).exists()


def test_image(number):
    """The record of an image of the test split, of the run's data or of --config's."""
    from convit_jax.data.sources import open_source

    values = flags.FLAGS
    if values.checkpoint and not values["config"].present and not is_run(values.checkpoint):
        raise UserError(f"{values.checkpoint} is not a run directory: add --config for the images.")
    source = open_source(required_config().data, "test")
    if number >= len(source):
        raise UserError(f"--image is {number}, but the test split has the images 0 to {len(source) - 1}.")
    return source[number]


def make_folder(path):
    """A folder for pictures."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error}): give another --output.") from error


if __name__ == "__main__":
    launch("visualize", main, define=define, config="configs/digits.py")
