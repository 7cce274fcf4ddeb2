"""Eq. 8 and the positional Gaussians against values known beforehand."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax import create_model
from convit_jax.analysis import locality


def test_it_is_that_of_the_maps_of_the_original(golden, original):
    model, images = golden.model(), original["images"]
    y, x = np.divmod(np.arange(36), 6)
    distances = np.sqrt((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2)
    found = locality.nonlocality(model, images)
    assert found.shape == (4, 4)
    np.testing.assert_allclose(locality.patch_distances((14, 14)).mean(), 7.281, atol=5e-4)  # as docs/training.md says
    for block in range(3):
        expected = np.einsum("bhnm,nm->bh", original[f"gpsa_attention_{block}"], distances).mean(0) / 36
        np.testing.assert_allclose(found[block], expected, rtol=1e-5)
    plain = np.asarray(model.attention_maps(images)[3])[:, :, 1:, 1:]
    plain = plain / plain.sum(-1, keepdims=True)
    np.testing.assert_allclose(found[3], np.einsum("bhnm,nm->bh", plain, distances).mean(0) / 36, rtol=1e-5)


def test_as_logged_every_block_sees_the_raw_patch_embedding(golden, original):
    model, images = golden.model(), jnp.asarray(original["images"])
    raw = model.patch_embed(images)
    found = locality.nonlocality(model, images, as_logged=True)
    distances = locality.patch_distances(model.grid)
    for block, of_heads in zip((model.blocks[0], model.blocks[3]), found[jnp.array([0, 3])], strict=True):
        maps = np.asarray(block.attn.attention_maps(raw)).mean(0)
        np.testing.assert_allclose(of_heads, np.einsum("hnm,nm->h", maps, distances) / 36, rtol=1e-5)


def test_images_that_do_not_count_change_nothing(golden, original):
    model, images = golden.model(), jnp.asarray(original["images"])
    some, other = (
        locality.nonlocality(model, each, valid=jnp.array([True, False, True]))
        for each in (images, images.at[1].multiply(9))
    )
    np.testing.assert_array_equal(some, other)
    assert np.abs(some - locality.nonlocality(model, images)).max() > 1e-4


def test_centres_and_spans_of_a_gaussian_and_of_weights_that_are_none():
    sizes = dict(patch_size=2, embed_dim=4, num_heads=4, depth=2, local_up_to_layer=1)
    model = create_model("convit_tiny", num_classes=2, image_size=(28, 36), **sizes)
    #         a Gaussian at (2, -1) | uniform | to the corners | to the right
    weights = np.array([[1.0, -0.5, -0.25], [0, 0, 0], [0, 0, 5], [20, 0, 0]], np.float32).T
    model.gpsa_blocks.attn.pos_proj.kernel = nnx.Param(jnp.asarray(weights[None]))
    centres, spans = locality.centres_and_spans(model)
    np.testing.assert_allclose(centres[0], [[2, -1], [0, 0], [0, 0], [17, 0]], atol=1e-3)
    uniform = np.sqrt((np.square(np.arange(-17, 18)).mean() + np.square(np.arange(-13, 14)).mean()) / 2)
    corners = np.sqrt((17**2 + 13**2) / 2)
    edge = np.sqrt(np.square(np.arange(-13, 14)).mean() / 2)
    np.testing.assert_allclose(spans[0], [2**0.5, uniform, corners, edge], rtol=1e-3)
