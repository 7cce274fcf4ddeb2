"""The authors' network with its weights: same maps, features, logits, loss and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from convit_jax import create_model

GOLDEN = ROOT / "tests/golden"
SUFFIXES = {"kernel": "weight", "scale": "weight"}


def original_tensors():
    """The state dict of convit_golden.safetensors, {name: array}."""
    data = (GOLDEN / "convit_golden.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


def original(path, tensors, local_blocks=3, depth=4):
    """The original's tensor for a parameter of ours, {path of keys} -> array in our layout."""

    def layout(tensor):
        if tensor.ndim == 4:
            return tensor.transpose(2, 3, 1, 0)  # convolution: OIHW -> HWIO
        return tensor.T if tensor.ndim == 2 else tensor

    names = [SUFFIXES.get(key.key, key.key) for key in path]
    blocks = {"gpsa_blocks": range(local_blocks), "sa_blocks": range(local_blocks, depth)}.get(names[0])
    if blocks is None:
        return layout(tensors[".".join(names)])
    return np.stack([layout(tensors[".".join(["blocks", str(i), *names[1:]])]) for i in blocks])


@pytest.fixture(scope="module")
def golden():
    """(graphdef, params of the original, reference values, images NHWC)."""
    sizes = json.loads((GOLDEN / "convit_golden_config.json").read_text())
    names = (
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "local_up_to_layer",
        "locality_strength",
        "qkv_bias",
    )
    model = create_model(
        "convit_tiny", num_classes=10, image_size=sizes["img_size"], **{name: sizes[name] for name in names}
    )
    graphdef, params = nnx.split(model)
    tensors = original_tensors()
    params = nnx.to_pure_dict(params)
    filled = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(original(path, tensors)), params)
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, params)
    with np.load(GOLDEN / "convit_golden_io.npz") as reference:
        reference = dict(reference)
    return graphdef, filled, reference, reference["images_nchw"].transpose(0, 2, 3, 1)


def test_maps_features_and_logits(golden):
    graphdef, params, reference, images = golden

    @jax.jit
    def outputs(params):
        model = nnx.merge(graphdef, params)
        return model(images), model.features(images), model.attention_maps(images)

    logits, features, maps = outputs(params)
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-5)
    np.testing.assert_allclose(features, reference["features"], atol=1e-5)
    for block in range(3):
        np.testing.assert_allclose(maps[block], reference[f"gpsa_attention_{block}"], atol=1e-6)


def test_loss_and_gradients(golden):
    graphdef, params, reference, images = golden

    def loss_fn(params):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(images))
        return -jnp.mean(log_p[jnp.arange(3), jnp.array([1, 2, 3])])

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, reference["loss_for_labels_1_2_3"], rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(grad**2) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, reference["grad_norm"], rtol=1e-5)
    tensors = {name[5:]: value for name, value in reference.items() if name.startswith("grad.")}
    assert len(tensors) == 9
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        names = [SUFFIXES.get(key.key, key.key) for key in path]
        for block in range(4):
            stack = {"gpsa_blocks": 0, "sa_blocks": 3}.get(names[0])
            name = ".".join(names if stack is None else ["blocks", str(block), *names[1:]])
            if name in tensors and (stack is None or 0 <= block - stack < grad.shape[0]):
                ours = grad if stack is None else grad[block - stack]
                theirs = tensors.pop(name)
                theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs
                theirs = theirs.T if theirs.ndim == 2 else theirs
                np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max() + 1e-6)
    assert not tensors, f"not compared: {list(tensors)}"
