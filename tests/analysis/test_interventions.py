"""Tables 5 and 6: parameters changed as the paper says, nothing else, and no NaN."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from flax import nnx

from convit_jax import create_model
from convit_jax.analysis.interventions import force_gates, mask_position_embedding
from convit_jax.errors import UserError

SMALL = dict(image_size=(12, 16), patch_size=4, embed_dim=16, depth=4, num_classes=5, num_heads=4)
IMAGES = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))


@pytest.mark.parametrize(
    ("to", "layers", "dtype"),
    [("position", None, "float32"), ("content", 1, "bfloat16")],
)
def test_forced_gates_leave_one_part_of_the_attention(to, layers, dtype):
    model = create_model("convit_tiny", **SMALL, local_up_to_layer=3, dtype=dtype)
    graphdef, params = nnx.graphdef(model), jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    before = jax.tree.map(np.copy, params)
    forced = nnx.merge(graphdef, force_gates(params, to, layers))
    assert_same(params, before)
    inputs = itertools.chain(*forced.map_attention(IMAGES, lambda attn, x: x))
    for number, (block, x) in enumerate(zip(forced.blocks, inputs, strict=True)):
        attn = block.attn
        if number < (layers or 3):
            assert attn.gates().tolist() == [to == "position"] * 4
            part = {"position": attn.positional_probabilities()[None], "content": attn.content_maps(x)}[to]
            maps = attn.attention_maps(x)
            np.testing.assert_array_equal(maps, jnp.broadcast_to(part, maps.shape))
        elif number < 3:
            np.testing.assert_array_equal(attn.gates(), model.blocks[number].attn.gates())
    logits = forced(IMAGES)
    assert jnp.isfinite(logits).all()
    assert jnp.abs(logits - model(IMAGES)).max() > 0


def test_a_gate_between_one_and_all_layers_or_a_sentence():
    params = {"gpsa_blocks": {"attn": {"gating_param": np.ones((3, 4))}}}
    for layers in (0, 4):
        with pytest.raises(UserError, match=f"gpsa_layers is {layers}, but the weights have 3 GPSA layers"):
            force_gates(params, "position", layers)
    with pytest.raises(UserError, match="no GPSA layer"):
        force_gates({"sa_blocks": {}}, "position")


def test_without_position_embedding_the_patches_enter_bare():
    model = create_model("deit_tiny", **SMALL)  # its class token has a position of its own, which goes too
    graphdef, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    changed = mask_position_embedding(params)
    x = nnx.merge(graphdef, changed).map_attention(IMAGES, lambda attn, x: x)[0][0]
    token = jnp.broadcast_to(model.cls_token[...], (2, 1, 16))
    bare = jnp.concatenate([token, model.patch_embed(IMAGES)], axis=1)
    np.testing.assert_allclose(x, model.blocks[0].norm1(bare), atol=1e-6)
    assert_same({**changed, "pos_embed": params["pos_embed"]}, params)
