"""Writes randaugment.npz: timm's fifteen RandAugment operations on two small photos at fixed magnitudes.

    python tests/golden/make_randaugment.py     # timm 1.0.31, Pillow 13.0.0, scikit-learn 1.9.1

Keys: "china" and "flower" are the images; "china/Rotate/9.0/-" is the result of an operation, a magnitude and
a sign, of the set "inc", with the mean colour of ImageNet as fill and bicubic interpolation.
"""

import random
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, LEVEL_TO_ARG, AugmentOp

PHOTOS = {  # box in the photo, (width, height) of the result
    "china": ((150, 60, 450, 360), (32, 32)),
    "flower": ((120, 40, 520, 280), (36, 24)),
}
MAGNITUDES = (3.25, 9.0, 10.0)
HPARAMS = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}


def results(image):
    """Name -> the image after every operation, for every setting that makes a difference."""
    for name in _RAND_INCREASING_TRANSFORMS:
        for magnitude in MAGNITUDES if LEVEL_TO_ARG[name] else MAGNITUDES[:1]:
            if name == "PosterizeIncreasing" and magnitude == 10.0:
                continue  # Pillow refuses 0 bits
            operation = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=HPARAMS)
            before = None
            for sign, draw in (("+", 0.0), ("-", 1.0)):  # timm negates if random() > 0.5
                with mock.patch.object(random, "random", lambda draw=draw: draw):
                    after = np.asarray(operation(image))
                if before is None or (after != before).any():
                    yield f"{name}/{magnitude}/{sign}", after
                before = after


arrays = {}
for photo, (box, size) in PHOTOS.items():
    image = Image.fromarray(load_sample_image(f"{photo}.jpg")).resize(size, Image.Resampling.BICUBIC, box=box)
    arrays[photo] = np.asarray(image)
    arrays |= {f"{photo}/{name}": array for name, array in results(image)}
np.savez_compressed(Path(__file__).with_name("randaugment.npz"), **arrays)
