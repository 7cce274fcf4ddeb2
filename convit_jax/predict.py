"""What is in an image: the five likeliest classes with their probabilities.

    python -m convit_jax.predict --checkpoint=convit_small cat.jpg holiday/ "more/*.png"

IMAGE: files, folders (the images below them) and patterns. Images that cannot be read are reported, the
others go on, and the exit status is then 1. --json prints one object a line:
{"image": path, "predictions": [{"label": 281, "class": "n02123045", "words": ..., "probability": 0.91}, ...]}
"""

import glob
import json
import sys
from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.data.class_names import words
from convit_jax.errors import UserError

SHOWN = 5


def define():
    define_weights()
    flags.DEFINE_bool("json", False, "One JSON object a line.")
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)


def main(arguments):
    """Predict the classes of the images."""
    import jax
    import numpy as np
    from flax import nnx

    from convit_jax.data.augment import normalize
    from convit_jax.data.images import centre_crop, decode

    paths = find_images(arguments)
    loaded = load_weights()
    how, size = loaded.preprocessing, loaded.settings["image_size"]
    graphdef, _ = loaded.network
    batch_size = min(flags.FLAGS.batch_size, len(paths))

    @jax.jit
    def predict(params, images):
        logits = nnx.merge(graphdef, params)(normalize(images, how.mean, how.std))
        return jax.lax.top_k(jax.nn.softmax(logits), min(SHOWN, logits.shape[-1]))

    params = jax.device_put(loaded.params())
    failed = 0
    for first in range(0, len(paths), batch_size):
        images, read = np.zeros((batch_size, *size, 3), np.uint8), []
        for path in paths[first : first + batch_size]:
            try:
                image = decode(read_bytes(path), path)
                images[len(read)] = centre_crop(image, size, how.crop_ratio, how.interpolation)
                read.append(path)
            except UserError as error:
                failed += 1
                print(f"predict: {error}", file=sys.stderr)
        if read:
            probabilities, labels = jax.device_get(predict(params, images))
            for path, *best in zip(read, probabilities, labels, strict=False):  # the rest is empty
                show(path, [answer(*pair, loaded) for pair in zip(*best, strict=True)])
    return 1 if failed else 0


def find_images(arguments):
    """Paths of the image files that the arguments name: each a file, a folder or a pattern."""
    from convit_jax.data.sources import IMAGE_SUFFIXES

    if not arguments:
        raise UserError("give at least one IMAGE: a file, a folder, or a pattern such as 'photos/*.jpg'.")
    paths = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            found = [str(file) for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
        elif glob.has_magic(argument) and not path.exists():
            found = [file for file in glob.glob(str(path), recursive=True) if not Path(file).is_dir()]
        else:
            found = []
        paths += sorted(found) or [str(path)]  # what is not there is reported with the unreadable ones
    return paths


def read_bytes(path):
    """The content of a file."""
    try:
        return Path(path).read_bytes()
    except IsADirectoryError as error:
        raise UserError(f"there is no image in the folder {path}: give another.") from error
    except OSError as error:
        raise UserError(f"cannot read the image {path} ({error.strerror}): check the path.") from error


def answer(probability, label, loaded):
    """One prediction, as JSON gives it."""
    name = loaded.class_name(label)
    return {"label": int(label), "class": name, "words": words(name), "probability": float(probability)}


def show(path, predictions):
    """Print the predictions of an image."""
    if flags.FLAGS.json:
        print(json.dumps({"image": path, "predictions": predictions}), flush=True)
        return
    lines = [f"  {100 * each['probability']:5.1f} %  {each['words']}" for each in predictions]
    print("\n".join([path, *lines]), flush=True)


if __name__ == "__main__":
    launch("predict", main, define=define, arguments="IMAGE...")
