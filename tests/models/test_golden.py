"""The authors' network with its weights: same maps, features, logits, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from flax import nnx

from convit_jax.weights.names import to_state_dict


def test_maps_features_and_logits(golden, original):
    model, images = golden.model(), original["images"]
    for block, maps in enumerate(model.attention_maps(images)[:3]):
        np.testing.assert_allclose(maps, original[f"gpsa_attention_{block}"], atol=1e-6)
    np.testing.assert_allclose(model.features(images), original["features"], atol=1e-5)
    np.testing.assert_allclose(model(images), original["logits"], atol=1e-5)


def test_tokens_and_intermediates_are_those_of_timm(golden, original):
    model, images = golden.model(), original["images"][:2]
    with np.load(GOLDEN / "timm_features.npz") as file:
        theirs = dict(file)
    tokens, blocks = model.forward_intermediates(images)
    for number, block in enumerate(blocks):
        np.testing.assert_allclose(block.transpose(0, 3, 1, 2), theirs[f"block_{number}"], atol=1e-5)
    np.testing.assert_allclose(tokens, theirs["forward_features"], atol=1e-5)
    np.testing.assert_allclose(model.forward_features(images), tokens, atol=1e-5)
    _, (normed,) = model.forward_intermediates(images, 1, norm=True)
    np.testing.assert_allclose(normed.transpose(0, 3, 1, 2), theirs["block_3_norm"], atol=1e-5)
    for wrong, words in (
        (5, "there are 4 blocks"),
        (0, "there are 4"),
        ([4], "no block 4: give 0"),
        ([0, -5], "no block -5"),
    ):
        with pytest.raises(ValueError, match=words):
            model.forward_intermediates(images, wrong)
    _, some = model.forward_intermediates(images, [-1, 1])
    for found, number in zip(some, (1, 3), strict=True):
        np.testing.assert_array_equal(found, blocks[number])


def test_loss_and_gradients(golden, original):
    def loss_fn(params):
        log_p = jax.nn.log_softmax(nnx.merge(golden.network[0], params)(original["images"]))
        return -jnp.mean(log_p[jnp.arange(3), jnp.array([1, 2, 3])])

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(golden.params())
    np.testing.assert_allclose(loss, original["loss_for_labels_1_2_3"], rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(grad**2) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, original["grad_norm"], rtol=1e-5)
    expected = {name[5:]: value for name, value in original.items() if name.startswith("grad.")}
    assert len(expected) == 9
    grads = to_state_dict(grads)
    for name, theirs in expected.items():
        np.testing.assert_allclose(grads[name], theirs, atol=1e-5 * np.abs(theirs).max() + 1e-6)
