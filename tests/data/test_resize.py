"""Images that the device crops and resizes, next to those of the host."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from convit_jax.data.examples import EvalExample, Slots, TrainExample
from convit_jax.data.resize import shown_images
from convit_jax.training.sharding import make_mesh, put_batch

SIZES = [(150, 100), (100, 150), (128, 128), (120, 70), (70, 120), (60, 40), (190, 127), (640, 30)]


class Photos(list):
    """Eight photos of many sizes; the last two are larger than a canvas of 128 pixels."""

    def __init__(self):
        china, flower = map(Image.fromarray, load_sample_images().images)
        super().__init__(np.asarray(image.resize(size)) for size, image in zip(SIZES, [china, flower] * 4, strict=True))
        self.labels = np.arange(len(self), dtype=np.int32)

    def name(self, number):
        return str(number)


PHOTOS = Photos()


def shown(batch, size):
    """The images of a batch, on four devices."""
    batch = {name: batch[name] for name in ("canvas", "on", "view")}
    return np.asarray(jax.jit(shown_images, static_argnums=1)(put_batch(batch, make_mesh(4, 1)), size))


def assert_close(found, expected):
    """At least 99 % of the values are equal, and the others differ by at most 2."""
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(56, 56), (40, 64)])
def test_the_device_shows_what_the_host_shows(size):
    host = TrainExample(PHOTOS, Slots(np.arange(len(PHOTOS)), 3, repeats=3), size, "resized")
    device = dataclasses.replace(host, canvas=128, group=6)
    first, second = host(range(24)), device(range(24))
    assert second["canvas"].shape == (4, 4, 128, 128, 3)  # a device may show the repeats of four images
    np.testing.assert_array_equal(second["label"], first["label"])
    images, large = shown(second, size), second["too_large"]
    assert 0 < large.sum() < 12
    assert_close(images, first["image"])
    np.testing.assert_array_equal(images[large], first["image"][large])  # Pillow's own

    host = EvalExample(PHOTOS, np.arange(len(PHOTOS)), size, 0.875)
    first, second = host(range(12)), dataclasses.replace(host, canvas=96)(range(12))
    assert 0 < second["too_large"].sum() < 6
    np.testing.assert_array_equal(second["valid"], first["valid"])
    assert_close(shown(second, size), first["image"])


@pytest.mark.parametrize(("count", "repeats"), [(1, 3), (7, 3), (8, 3), (300, 3), (9, 1), (20, 5)])
def test_no_batch_has_more_images_than_there_are_canvases(count, repeats):
    slots = Slots(np.arange(count), 0, repeats)
    order = [(epoch, at // repeats) for epoch in range(40) for at in range(slots.epoch_length)]
    for rows in (1, 2, 4, 6, 12):
        found = {len({*order[first : first + rows]}) for first in range(len(order) - rows)}
        assert max(found) <= slots.most_images(rows) <= min(rows, max(found) + 1)
