"""The table of models: names, exact sizes, cost, and what wrong settings say."""

import jax
import numpy as np
import pytest
from flax import nnx

import convit_jax
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, count_macs, count_params, model_settings

# Parameters (1000 classes, 224 px) as measured in the original, GMACs as printed in the paper.
TABLE_1 = {
    "convit_tiny": (5_710_512, 1),
    "convit_tiny_plus": (9_972_912, 2),
    "convit_small": (27_777_322, 5.4),
    "convit_small_plus": (48_979_882, 10),
    "convit_base": (86_540_040, 17),
    "convit_base_plus": (153_134_856, 30),
    "deit_tiny": (5_717_416, 1),
    "deit_tiny_plus": (9_982_184, 2),
    "deit_small": (22_050_664, 4.3),
    "deit_small_plus": (49_000_744, 10),
    "deit_base": (86_567_656, 17),
    "deit_base_plus": (153_171_944, 30),
}


def test_every_model_is_in_the_table():
    assert convit_jax.list_models() == list(TABLE_1)


@pytest.mark.parametrize("name", convit_jax.list_models())
def test_exact_parameter_count_and_cost(name):
    params, gmacs = TABLE_1[name]
    settings = model_settings(name)
    assert count_params(abstract_model(settings)[1]) == params
    assert abs(count_macs(settings) / 1e9 - gmacs) < 0.07 * gmacs + 0.3


@pytest.mark.parametrize(
    ("name", "params"),
    [("deit_tiny", 5_910_800), ("deit_small", 22_436_432), ("deit_base", 87_338_192)],  # timm's
)
def test_exact_parameter_count_with_a_distillation_token(name, params):
    assert count_params(abstract_model(model_settings(name, distilled=True))[1]) == params


@pytest.mark.parametrize(
    ("name", "distilled"), [("convit_tiny", False), ("deit_tiny", False), ("deit_tiny", True)]
)
def test_macs_are_those_of_the_compiled_program(name, distilled):
    settings = model_settings(
        name, num_classes=10, image_size=(64, 32), patch_size=8, scan_unroll=12, distilled=distilled
    )
    graphdef, params = abstract_model(settings)
    images = jax.ShapeDtypeStruct((1, 64, 32, 3), np.float32)
    lowered = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x)).lower(params, images)
    flops = lowered.cost_analysis()["flops"]
    assert 2 * count_macs(settings) < flops < 2 * count_macs(settings) * 1.08  # the rest is elementwise


def test_the_seed_decides_the_weights():
    tiny = dict(num_classes=2, image_size=16, embed_dim=8, depth=2, local_up_to_layer=1)
    first, again, other = (
        jax.tree.leaves(nnx.state(convit_jax.create_model("convit_tiny", seed=seed, **tiny)))
        for seed in (3, 3, 4)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(UserError, match=f"seed is {seed}: it must be 0 to 4294967295"):
        convit_jax.create_model("convit_tiny", seed=seed)


def test_overrides_reach_the_model():
    model = convit_jax.create_model(
        "convit_small", num_classes=5, image_size=(32, 48), depth=4, local_up_to_layer=3, gate_init=0.0
    )
    assert len(model.blocks) == 4
    assert model.blocks[0].attn.grid == (2, 3)
    np.testing.assert_array_equal(model.blocks[2].attn.gates(), 0.5)
    assert model.head.kernel.shape == (432, 5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("convit_smal", {}, "no model 'convit_smal', did you mean 'convit_small'"),
        ("convit_tiny", {"embed_dims": 8}, "no setting 'embed_dims', did you mean 'embed_dim'"),
        ("convit_tiny", {"image_size": 225}, "image_size 225 x 225 is not a multiple of patch_size 16"),
        ("convit_tiny", {"embed_dim": 190}, "embed_dim 190 is not a multiple of num_heads 4"),
        ("convit_tiny", {"local_up_to_layer": 12}, "one block must be left for the class token"),
        ("convit_tiny", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0: it is a probability"),
        ("convit_tiny", {"dtype": "float16"}, "choose float32 or bfloat16"),
        ("convit_tiny", {"depth": 0}, "depth is 0: it must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(name, settings, message):
    with pytest.raises(UserError, match=message):
        convit_jax.create_model(name, **settings)
