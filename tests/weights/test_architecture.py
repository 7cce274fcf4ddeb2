"""The table of names, what is read off names and shapes, and what only the caller can tell."""

import jax
import numpy as np
import pytest
from conftest import assert_same

from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, list_models, model_settings
from convit_jax.weights.architecture import infer
from convit_jax.weights.names import check_state_dict, state_dict_shapes, to_params, to_state_dict


def tensors_of(settings):
    """A state dict of these sizes that takes no memory."""
    params = abstract_model(settings)[1]
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in state_dict_shapes(params).items()}


@pytest.mark.parametrize(
    ("name", "settings"), [("convit_tiny", {"local_up_to_layer": 2}), ("deit_tiny", {"distilled": True})]
)
def test_there_and_back_gives_the_same_tensors_in_float32(name, settings):
    rng, params = np.random.default_rng(0), abstract_model(model_settings(name, image_size=32, depth=3, **settings))[1]
    tensors = {name: rng.normal(size=shape).astype(np.float16) for name, shape in state_dict_shapes(params).items()}
    filled = to_params(tensors, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(filled)} == {np.dtype(np.float32)}
    assert jax.tree.map(np.shape, filled) == jax.tree.map(np.shape, params)
    assert_same(to_state_dict(filled), tensors)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in list_models()),
        ("convit_tiny", dict(embed_dim=24, num_heads=6, depth=5, local_up_to_layer=1, mlp_ratio=2.5)),
        ("convit_small", dict(qkv_bias=True, distilled=True, patch_size=8, in_chans=1)),
        ("deit_tiny", dict(qkv_bias=False, depth=2)),
        ("deit_base", dict(distilled=True)),
        ("deit_tiny", dict(pos_embed_class_token=False)),
        ("convit_small", dict(local_up_to_layer=0)),
        ("convit_tiny", dict(pos_embed_class_token=True, distilled=True)),
    ],
)
def test_every_model_of_the_table_and_other_sizes_are_recognised(name, settings):
    settings = model_settings(name, num_classes=3, image_size=64, **settings)
    assert infer(tensors_of(settings), "it") == settings


def test_an_mlp_ratio_that_no_float_gives_exactly():
    settings = model_settings("convit_tiny", image_size=32, mlp_ratio=517 / 192 + 1e-9)
    assert int(192 * infer(tensors_of(settings), "it")["mlp_ratio"]) == 517


def test_the_shape_of_an_oblong_grid_comes_from_the_caller():
    settings = model_settings("convit_tiny", image_size=(32, 64))
    tensors = tensors_of(settings)
    assert infer(tensors, "it", image_size=(32, 64)) == settings
    assert infer(tensors, "it", image_size=(64, 32))["image_size"] == (64, 32)
    with pytest.raises(UserError, match="8 positions, which make no square: give the size of the training images"):
        infer(tensors, "it", image_size=(48, 64))
    settings = model_settings("deit_tiny", image_size=(32, 64))  # 2 x 4 + 1 = 3 x 3 entries are no square
    assert infer(tensors_of(settings), "it", image_size=(32, 64)) == settings


def test_the_heads_of_an_unknown_deit_come_from_the_caller():
    tensors = tensors_of(model_settings("deit_tiny", image_size=32, embed_dim=40, num_heads=5))
    assert infer(tensors, "it", num_heads=5)["num_heads"] == 5
    with pytest.raises(UserError, match="num_heads is 0: it must be at least 1"):
        infer(tensors, "it", num_heads=0)
    with pytest.raises(UserError, match=r"width 40, which is none of .* with --heads"):
        infer(tensors, "it")


def test_what_is_no_network_of_this_kind_is_said_in_a_sentence():
    tensors = tensors_of(model_settings("convit_tiny", image_size=32, depth=4, local_up_to_layer=2))
    cases = {
        "no usable patch_embed.proj.weight, pos_embed, cls_token": {"fc.weight": np.zeros((2, 2))},
        "no usable pos_embed": {**tensors, "pos_embed": np.zeros(7)},
        "no usable blocks.0.attn.gating_param": {n: t for n, t in tensors.items() if "gating" not in n},
    }
    for sentence, broken in cases.items():
        with pytest.raises(UserError, match=sentence):
            infer(broken, "it")
    with pytest.raises(UserError, match=r"gating_param \[4\] .*instead of \[2\]"):
        check_state_dict(tensors, abstract_model(infer(tensors, "it", num_heads=2))[1], "it")
    gap = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}
    late = {**tensors, "blocks.3.attn.gating_param": np.zeros(4)}
    whole = {**tensors, "blocks.1.norm1.bias": np.zeros(192, np.int64)}
    for broken in (gap, late, whole, {**tensors, "blocks.1.attn.gating_param": np.zeros(5)}):
        with pytest.raises(UserError, match=r"do not fit .*blocks\.[13]\."):
            check_state_dict(broken, abstract_model(infer(broken, "it"))[1], "it")
    all_kinds = {**gap, **whole, "more.weight": np.zeros(2)}
    del all_kinds["norm.bias"]
    with pytest.raises(UserError, match=r"missing: norm.bias; unexpected: more.weight; .*blocks.1.norm1.bias .*int64"):
        check_state_dict(all_kinds, abstract_model(infer(tensors, "it"))[1], "it")
