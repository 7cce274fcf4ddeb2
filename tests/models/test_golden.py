"""The authors' network with its weights: same maps, features, logits, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from convit_jax.models.variants import abstract_model
from convit_jax.weights import pretrained
from convit_jax.weights.names import to_state_dict

GOLDEN = ROOT / "tests/golden"
FILES = ("convit_golden.safetensors", "convit_golden.pth", "convit_golden_training.pth")


@pytest.fixture(scope="module")
def golden():
    """(graphdef, params of the original, reference values, images NHWC)."""
    loaded = pretrained.load(GOLDEN / FILES[0])
    with np.load(GOLDEN / "convit_golden_io.npz") as file:
        reference = dict(file)
    images = reference["images_nchw"].transpose(0, 2, 3, 1)
    return abstract_model(loaded.settings)[0], jax.tree.map(jnp.asarray, loaded.params()), reference, images


@pytest.mark.parametrize("file", FILES)
def test_logits_of_every_kind_of_file(golden, file):
    _, _, reference, images = golden
    model = pretrained.load_pretrained(GOLDEN / file)
    np.testing.assert_allclose(model(images), reference["logits"], atol=1e-5)


def test_features_and_maps(golden):
    graphdef, params, reference, images = golden
    model = nnx.merge(graphdef, params)
    np.testing.assert_allclose(model.features(images), reference["features"], atol=1e-5)
    for block, maps in enumerate(model.attention_maps(images)[:3]):
        np.testing.assert_allclose(maps, reference[f"gpsa_attention_{block}"], atol=1e-6)


def test_tokens_and_intermediates_are_those_of_timm(golden):
    graphdef, params, _, images = golden
    model = nnx.merge(graphdef, params)
    with np.load(GOLDEN / "timm_features.npz") as file:
        theirs = dict(file)
    tokens, blocks = model.forward_intermediates(images[:2])
    for number, block in enumerate(blocks):
        np.testing.assert_allclose(block.transpose(0, 3, 1, 2), theirs[f"block_{number}"], atol=1e-5)
    np.testing.assert_allclose(tokens, theirs["forward_features"], atol=1e-5)
    np.testing.assert_allclose(model.forward_features(images[:2]), tokens, atol=1e-5)
    _, (normed,) = model.forward_intermediates(images[:2], 1, norm=True)
    np.testing.assert_allclose(normed.transpose(0, 3, 1, 2), theirs["block_3_norm"], atol=1e-5)
    _, some = model.forward_intermediates(images[:2], [-1, 1])
    for found, number in zip(some, (1, 3), strict=True):
        np.testing.assert_array_equal(found, blocks[number])


def test_loss_and_gradients(golden):
    graphdef, params, reference, images = golden

    def loss_fn(params):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(images))
        return -jnp.mean(log_p[jnp.arange(3), jnp.array([1, 2, 3])])

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, reference["loss_for_labels_1_2_3"], rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(grad**2) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, reference["grad_norm"], rtol=1e-5)
    expected = {name[5:]: value for name, value in reference.items() if name.startswith("grad.")}
    assert len(expected) == 9
    grads = to_state_dict(grads)
    for name, theirs in expected.items():
        np.testing.assert_allclose(grads[name], theirs, atol=1e-5 * np.abs(theirs).max() + 1e-6)
