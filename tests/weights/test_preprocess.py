"""From images to labels, as a user of the Python API goes."""

import numpy as np
import pytest
from PIL import Image

from convit_jax.errors import UserError


def test_a_path_a_picture_and_pixels_give_the_same_input(golden, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    model = golden.model()
    images = model.preprocess([tmp_path / "photo.png", Image.fromarray(pixels), pixels, str(tmp_path / "photo.png")])
    assert (images.shape, images.dtype) == ((4, 48, 48, 3), np.float32)
    for image in images:
        np.testing.assert_array_equal(image, model.preprocess(pixels)[0])
    np.testing.assert_array_equal(model.preprocess(np.stack([pixels] * 2))[1], images[0])
    grey = model.preprocess(np.full((50, 50, 3), 128, np.uint8))[0, 0, 0]
    np.testing.assert_allclose(grey, (128 / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], atol=1e-6)
    assert model(images).shape == (4, 10)
    with pytest.raises(UserError, match=r"an image is float32 \[60, 80, 3\]: give a path, a Pillow image, or uint8"):
        model.preprocess(pixels / np.float32(255))
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        model.preprocess(tmp_path / "nowhere.jpg")
