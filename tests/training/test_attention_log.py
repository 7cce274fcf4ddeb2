"""What the line of an evaluation tells of attention, and on which images."""

import jax
import numpy as np
from conftest import saved
from flax import nnx

from convit_jax.analysis import locality
from convit_jax.data.augment import normalize
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.rundir import read_metrics
from convit_jax.training.attention_log import make_attention_log, spread_images
from convit_jax.training.plan import make_plan
from convit_jax.training.sharding import make_mesh


def measured(config, params):
    """What is logged of parameters."""
    plan, mesh = make_plan(config, devices=1), make_mesh(1, 1)
    graphdef, _ = abstract_model(plan.model)
    return make_attention_log(graphdef, config, plan, mesh)(params)


def test_an_evaluation_logs_what_the_weights_look_at(digits_config, trained):
    lines = read_metrics(trained / "metrics.jsonl")
    last = next(line for line in lines if "val_top1" in line)
    np.testing.assert_allclose(lines[0]["gates"], 0.7311, atol=1e-4)  # step 0: new weights
    assert not any("gates" in line for line in lines if "train_loss" in line)
    digits_config.locality.as_logged = True
    params = saved(trained)["state"]["params"]
    found = measured(digits_config, params)
    logged = found.pop("nonlocality_as_logged")
    assert {name: last[name] for name in found} == found
    assert logged != found["nonlocality"]

    plan = make_plan(digits_config, devices=1)
    model = nnx.merge(abstract_model(plan.model)[0], params)
    pixels = spread_images(plan.test, 4)["image"]
    images = normalize(pixels, digits_config.data.mean, digits_config.data.std)
    expected = jax.jit(lambda: locality.nonlocality(model, images))()
    np.testing.assert_allclose(found["nonlocality"], expected, atol=6e-5)
    assert [np.shape(found[name]) for name in ("gates", "centre_x", "centre_y", "span")] == [(2, 4)] * 4


def test_what_the_model_or_the_config_does_not_have_is_left_out(digits_config):
    digits_config.locality.images = 0
    params = initial_params(make_plan(digits_config, devices=1).model, 0)
    assert set(measured(digits_config, params)) == {"gates", "centre_x", "centre_y", "span"}
    digits_config.model.name, digits_config.model.local_up_to_layer = "deit_tiny", 0
    params = initial_params(make_plan(digits_config, devices=1).model, 0)
    assert measured(digits_config, params) == {}
    digits_config.locality.images = None
    assert set(measured(digits_config, params)) == {"nonlocality"}


def test_the_images_are_spread_over_the_split(digits_config, image_folder):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size = digits_config.eval_batch_size = 8
    (image_folder / "val/bee/0.jpg").write_bytes(b"no image")
    example = make_plan(digits_config, devices=1).test
    batch = spread_images(example, 3)
    np.testing.assert_array_equal(batch["image"], example([0, 2, 4])["image"])
    assert batch["valid"].tolist() == [True, False, True]
