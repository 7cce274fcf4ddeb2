"""The table of names: both directions, and what is said of weights that do not fit."""

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same

from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.weights.names import check_state_dict, state_dict_shapes, to_params, to_state_dict

TINY = dict(num_classes=5, image_size=16, patch_size=8, embed_dim=8, num_heads=4, depth=3)


def settings(name="convit_tiny", **more):
    local = {"local_up_to_layer": 2} if name.startswith("convit") else {}
    return model_settings(name, **{**TINY, **local, **more})


def state_dict(*name, **more):
    rng = np.random.default_rng(0)
    names = state_dict_shapes(abstract_model(settings(*name, **more))[1])
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}


@pytest.mark.parametrize(("name", "more"), [("convit_tiny", {}), ("deit_tiny", {"distilled": True})])
def test_there_and_back_gives_the_same_tensors(name, more):
    tensors = state_dict(name, **more)
    params = abstract_model(settings(name, **more))[1]
    filled = to_params(tensors, params)
    assert jax.tree.map(np.shape, filled) == jax.tree.map(np.shape, params)
    assert_same(to_state_dict(filled), tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_each_layer_of_a_stack_is_its_own_block_in_float32(dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in state_dict().items()}
    params = to_params(tensors, abstract_model(settings())[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    for stack, layer, block in (("gpsa_blocks", 1, 1), ("sa_blocks", 0, 2)):
        weight = tensors[f"blocks.{block}.mlp.fc1.weight"].astype(np.float32)
        np.testing.assert_array_equal(params[stack]["mlp"]["fc1"]["kernel"][layer], weight.T)


def test_everything_that_does_not_fit_is_reported_at_once():
    tensors = state_dict()
    del tensors["blocks.1.attn.qk.weight"], tensors["norm.bias"]
    tensors["blocks.0.attn.qkv.weight"] = np.zeros((24, 8), np.float32)
    tensors["head.bias"] = np.zeros(6, np.float32)
    tensors["norm.weight"] = np.zeros(8, np.int64)
    with pytest.raises(UserError) as error:
        check_state_dict(tensors, abstract_model(settings())[1], "some.pth")
    said = str(error.value)
    assert "in some.pth do not fit" in said
    assert "missing: blocks.1.attn.qk.weight, norm.bias;" in said
    assert "unexpected: blocks.0.attn.qkv.weight;" in said
    assert "head.bias [6] (float32) instead of [5]" in said
    assert "norm.weight [8] (int64) instead of [8]" in said
