"""Print the five most likely classes of images.

    python -m convit_jax.predict --checkpoint=convit_small cat.jpg holiday/ "more/*.png"

IMAGE is a file, a folder with images at any depth, or a pattern. Unreadable images are reported, the others
go on, and the exit status is 1. --json prints one object per line:
{"image": path, "predictions": [{"label": 281, "class": "n02123045", "words": ..., "probability": 0.91}, ...]}
"""

import glob
import json
import sys
from collections import Counter
from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.errors import UserError


def _define_flags() -> None:
    define_weights()
    flags.DEFINE_bool("json", False, "One JSON object per line.")
    flags.DEFINE_integer("batch_size", 32, "Images per batch.", lower_bound=1)


def main(arguments: list[str]) -> int:
    """Predicts the classes of the images; returns the exit status."""
    import jax
    import numpy as np

    from convit_jax.data.augment import normalize
    from convit_jax.data.class_names import words
    from convit_jax.data.images import centre_crop, open_image

    paths = find_images(arguments)
    loaded = load_weights(needs_head=True)
    model, how, size = loaded.model(), loaded.preprocessing, loaded.settings["image_size"]
    batch_size = min(flags.FLAGS.batch_size, len(paths))

    failed = False
    for first in range(0, len(paths), batch_size):
        images = np.zeros((batch_size, *size, 3), np.uint8)
        read: list[str] = []
        for path in paths[first : first + batch_size]:
            try:
                images[len(read)] = centre_crop(open_image(path), size, how.crop_ratio, how.interpolation)
                read.append(path)
            except UserError as error:
                failed = True
                print(f"predict: {error}", file=sys.stderr)
        if not read:
            continue
        logits = model(normalize(jax.device_put(images), how.mean, how.std))
        best = jax.lax.top_k(jax.nn.softmax(logits), min(5, logits.shape[-1]))
        for path, probabilities, labels in zip(read, *jax.device_get(best), strict=False):  # padded
            answers, text = [], [path]
            for label, probability in zip(labels.tolist(), probabilities.tolist(), strict=True):
                name = loaded.class_name(label)
                answers.append({"label": label, "class": name, "words": words(name), "probability": probability})
                text.append(f"  {100 * probability:5.1f} %  {words(name)}")
            whole = json.dumps({"image": path, "predictions": answers}) if flags.FLAGS.json else "\n".join(text)
            print(whole, flush=True)
    return int(failed)


def find_images(arguments: list[str]) -> list[str]:
    """Returns the paths of files, images in folders and matches of patterns, also of what does not exist."""
    from convit_jax.data.sources import walk_images

    if not arguments:
        raise UserError("give at least one IMAGE: a file, a folder, or a pattern such as 'photos/*.jpg'.")
    paths = []
    for argument in arguments:
        path = Path(argument).expanduser()
        found: list[str] = []
        if path.is_dir():
            found = [*walk_images(path, Counter(), set())]
        elif not path.exists():
            found = [file for file in glob.glob(str(path), recursive=True) if not Path(file).is_dir()]
        paths += sorted(found) or [str(path)]
    return paths


if __name__ == "__main__":
    launch("predict", main, define=_define_flags, arguments="IMAGE...")
