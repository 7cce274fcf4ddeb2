"""The table of models: names, exact sizes, cost, seeds, and refused settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from flax import nnx

import convit_jax
from convit_jax import create_model
from convit_jax.errors import UserError
from convit_jax.models.initializers import trunc_normal, uniform
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
DISTILLED = {"deit_tiny": 5_910_800, "deit_small": 22_436_432, "deit_base": 87_338_192}  # as in timm


@pytest.mark.parametrize("name", TABLE_1)
def test_exact_parameter_count_and_cost(name):
    params, gmacs = TABLE_1[name]
    settings = model_settings(name)
    assert count_params(abstract_model(settings)[1]) == params
    assert abs(count_macs(settings) / 1e9 - gmacs) < 0.07 * gmacs + 0.3
    if name in DISTILLED:
        assert count_params(abstract_model(model_settings(name, distilled=True))[1]) == DISTILLED[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("convit_tiny", {"local_up_to_layer": 2}), ("deit_tiny", {}), ("deit_tiny", {"distilled": True})],
)
def test_macs_are_those_of_the_compiled_program(name, settings):
    small = dict(num_classes=10, image_size=(64, 32), patch_size=8, depth=4, scan_unroll=4)
    settings = model_settings(name, **small, **settings)
    graphdef, params = abstract_model(settings)
    images = jax.ShapeDtypeStruct((1, 64, 32, 3), np.float32)
    lowered = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x)).lower(params, images)
    flops = lowered.cost_analysis()["flops"]
    assert 2 * count_macs(settings) < flops < 2 * count_macs(settings) * 1.08  # the rest is elementwise


def test_the_seed_decides_the_weights_and_an_mlp_does_not_depend_on_its_attention():
    def params(seed, local=1):
        small = dict(num_classes=2, image_size=16, embed_dim=8, depth=2, local_up_to_layer=local)
        return nnx.state(create_model("convit_tiny", seed=seed, **small))

    first, other, plain = params(3), params(4), params(3, local=0)
    assert_same(first, params(3))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
    of_gpsa, of_plain = first["gpsa_blocks"]["mlp"]["fc1"], plain["sa_blocks"]["mlp"]["fc1"]
    np.testing.assert_array_equal(of_gpsa["kernel"][0], of_plain["kernel"][0])


def test_initial_values_are_those_of_jax_random_for_any_shape():
    key = jax.random.key(7)
    for shape in ((3,), (5, 4), (700, 400)):
        np.testing.assert_array_equal(trunc_normal(key, shape), jax.jit(trunc_normal, static_argnums=1)(key, shape))
        np.testing.assert_array_equal(uniform(0.1)(key, shape), jax.random.uniform(key, shape, minval=-0.1, maxval=0.1))


def test_names_and_dtypes_of_timm_users():
    assert convit_jax.list_models() == list(TABLE_1)
    assert model_settings("convit_tiny.fb_in1k") == model_settings("convit_tiny", dtype=jnp.float32)
    assert model_settings("convit_tiny", image_size="224x448")["image_size"] == (224, 448)
    assert model_settings("deit_base_patch16_384")["image_size"] == (384, 384)
    assert model_settings("deit_small_distilled_patch16_224.fb_in1k", dtype=jnp.bfloat16) == model_settings(
        "deit_small", distilled=True, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("convit_smal", {}, "no model 'convit_smal', did you mean 'convit_small'"),
        ("convit_tiny", {"embed_dims": 8}, "no setting 'embed_dims', did you mean 'embed_dim'"),
        ("convit_tiny", {"img_size": 224}, "no setting 'img_size': use image_size"),
        ("convit_tiny", {"pretrained": True}, r"'pretrained': use convit_jax.load_pretrained\(name\)"),
        ("convit_tiny", {"local_up_to_layer": 12}, "the class token needs a block: give 0 to 11"),
        ("convit_tiny", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0: give a probability"),
        ("convit_tiny", {"scan_unroll": "all"}, "scan_unroll is .all.: it must be at least 1 and a whole number"),
        ("convit_tiny", {"attention": "flash"}, "attention is 'flash': choose xla or cudnn"),
        ("convit_tiny", {"attention": "cudnn", "dtype": "bfloat16", "embed_dim": 36}, "but heads have 9"),
        ("convit_tiny", {"seed": 2**32}, "seed is 4294967296: it must be 0 to 4294967295"),
    ],
)
def test_bad_settings_are_refused_by_name(name, settings, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **settings)
