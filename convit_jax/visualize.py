"""Draw what a network looks at, and what a training sees.

    python -m convit_jax.visualize --checkpoint=PATH --image=photo.jpg --output=DIR [--query=ROW,COLUMN]
    python -m convit_jax.visualize --html --checkpoint=PATH --image=photo.jpg --output=page.html
    python -m convit_jax.visualize --init --config=configs/convit_s.py [--image=photo.jpg] --output=DIR
    python -m convit_jax.visualize --run=RUN --output=DIR
    python -m convit_jax.visualize --augmentations --config=configs/convit_ti.py --output=augmented.png

--init takes --checkpoint too, for that model with the seed of the run. --image is a file, or the number of an
image in the test split of the run's data or of --config. --html writes one page with the attention of every patch.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from convit_jax.cli import define_weights, launch, load_weights, required_config
from convit_jax.config import is_run, load_run_config
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics

if TYPE_CHECKING:
    from convit_jax.weights.preprocess import Preprocessing


def _define_flags() -> None:
    flags.DEFINE_bool("augmentations", False, "Draw training images after augmentation.")
    flags.DEFINE_bool("html", False, "Write one page, for a browser, with the attention of every patch.")
    flags.DEFINE_bool("init", False, "Draw the attention of a GPSA layer before training (Fig. 3).")
    flags.DEFINE_string("run", None, "Draw learning curves, gates and non-locality of this run directory.")
    flags.DEFINE_string("image", None, "An image file, or the number of an image of the test split.")
    flags.DEFINE_string("query", None, "ROW,COLUMN of the patch to look from, counted from 0; the centre.")
    flags.DEFINE_list("layers", None, "Numbers of the layers to show, counted from 1, as 1,6,12; all.")
    flags.DEFINE_string("output", None, "Directory for the pictures; with --html or --augmentations also a file.")
    define_weights()


def main(arguments: list[str]) -> None:
    """Draws what the flags ask for and prints the paths."""
    values = flags.FLAGS
    draw = {
        "augmentations": visualize_augmentations,
        "html": visualize_attention,
        "init": visualize_init,
        "run": visualize_run,
    }
    modes = [mode for mode in draw if values[mode].value]
    if len(modes) > 1 or (modes in ([], ["html"]) and not (values.checkpoint and values.image)):
        raise UserError("give --checkpoint=PATH and --image=IMAGE, or one of --init, --run=DIR and --augmentations.")
    if values.output is None:
        raise UserError("there is no place for the pictures: add --output=DIR.")
    visualize = draw[modes[0]] if modes else visualize_attention
    for path in visualize(Path(values.output).expanduser()):
        print(path)


def visualize_augmentations(path: Path) -> list[Path]:
    """Draws training images into a file, or into augmentations.png of a directory."""
    from convit_jax.figures.augmentations import draw_augmentations
    from convit_jax.training.plan import follow_weights, make_plan
    from convit_jax.training.preview import preview_augmentation

    config = follow_weights(required_config())
    pictures = preview_augmentation(config, make_plan(config, devices=1))
    return draw_augmentations(_as_file(path, "augmentations.png"), pictures)


def visualize_run(directory: Path) -> list[Path]:
    """Draws learning curves, gates and non-locality of --run."""
    from convit_jax.figures.curves import draw_curves
    from convit_jax.figures.locality import draw_locality
    from convit_jax.models.variants import settings_of

    run = Path(flags.FLAGS.run).expanduser()
    settings = settings_of(load_run_config(run).model)
    if not read_metrics(run / "metrics.jsonl"):
        raise UserError(f"{run} has an empty metrics.jsonl, or none: nothing is logged yet.")
    return [*draw_curves(run, directory), *draw_locality(run, directory, settings)]


def visualize_attention(output: Path) -> list[Path]:
    """Draws the attention of --checkpoint for --image: maps into a directory, or with --html a page into a file."""
    from convit_jax.analysis.maps import layer_maps
    from convit_jax.figures.maps import draw_attention_maps
    from convit_jax.figures.page import write_page

    loaded = load_weights()
    query, numbers = _read_query(loaded.settings), _read_layers(loaded.settings)
    image, normalised = read_image(loaded.settings, loaded.preprocessing)
    model = loaded.model()
    layers = layer_maps(model, normalised)
    wanted = {number: layers[number - 1] for number in numbers}
    if not flags.FLAGS.html:
        return draw_attention_maps(output, wanted, image, model.grid, query)
    title = f"Attention of {Path(flags.FLAGS.checkpoint).name}, image {Path(flags.FLAGS.image).name}"
    return write_page(_as_file(output, "attention.html"), wanted, image, model.grid, title)


def visualize_init(directory: Path) -> list[Path]:
    """Draws the first GPSA layer of --checkpoint's or --config's model before training."""
    from convit_jax.analysis.maps import init_maps
    from convit_jax.figures.maps import draw_init_maps
    from convit_jax.models.variants import settings_of
    from convit_jax.training.plan import follow_weights
    from convit_jax.weights.preprocess import Preprocessing

    if flags.FLAGS.checkpoint:
        loaded, config = load_weights(), flags.FLAGS.config  # the run's, unless --config is given
        settings, how, seed = loaded.settings, loaded.preprocessing, config.seed if config else 0
    else:
        config = follow_weights(required_config())
        settings, seed, how = settings_of(config.model), config.seed, Preprocessing.of_config(config.data)
    query = _read_query(settings)
    image, normalised = read_image(settings, how) if flags.FLAGS.image else (None, None)
    return draw_init_maps(directory, *init_maps(settings, seed, query, normalised), image, query)


def _as_file(path: Path, name: str) -> Path:
    """The file that --output names: `name` in it if it is a directory."""
    return path / name if path.is_dir() or not path.suffix else path


def _read_query(settings: dict[str, Any]) -> tuple[int, int]:
    """(row, column) of --query, by default the centre."""
    rows, columns = (side // settings["patch_size"] for side in settings["image_size"])
    match = re.fullmatch(r"(\d+),(\d+)", flags.FLAGS.query or f"{rows // 2},{columns // 2}")
    row, column = map(int, match.groups()) if match else (rows, columns)
    if row >= rows or column >= columns:
        raise UserError(f"--query is {flags.FLAGS.query}: give ROW,COLUMN of a patch, 0,0 to {rows - 1},{columns - 1}.")
    return row, column


def _read_layers(settings: dict[str, Any]) -> list[int]:
    """The numbers in --layers, counted from 1, by default all."""
    numbers, depth = flags.FLAGS.layers, settings["depth"]
    known = {str(number): number for number in range(1, depth + 1)}
    if numbers and not {*numbers} <= {*known}:
        raise UserError(f"--layers is {','.join(numbers)}: give numbers from 1 to {depth}, as 1,{depth}.")
    return sorted({known[number] for number in numbers or known})


def read_image(settings: dict[str, Any], how: "Preprocessing") -> tuple[np.ndarray, np.ndarray]:
    """Returns --image as the network sees it, uint8 [H, W, 3], and normalised, float32 [H, W, 3]."""
    import jax

    from convit_jax.data.augment import normalize
    from convit_jax.data.images import centre_crop, decode, open_image
    from convit_jax.data.sources import open_source

    given, checkpoint = flags.FLAGS.image, flags.FLAGS.checkpoint
    if not given.isdigit() or Path(given).exists():
        whole = open_image(given)
    elif checkpoint and not flags.FLAGS["config"].present and not is_run(checkpoint):
        raise UserError(f"{checkpoint} is not a run directory: add --config for the images.")
    else:
        source = open_source(required_config().data, "test")
        if int(given) >= len(source.labels):
            raise UserError(f"--image is {given}, but the test split has images 0 to {len(source.labels) - 1}.")
        whole = decode(source[int(given)], given)
    image = centre_crop(whole, settings["image_size"], how.crop_ratio, how.interpolation)
    return image, jax.device_get(normalize(jax.numpy.asarray(image[None]), how.mean, how.std))[0]


if __name__ == "__main__":
    launch("visualize", main, define=_define_flags, config="configs/digits.py")
