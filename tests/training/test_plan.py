"""What a config amounts to, and which configs are refused."""

import numpy as np
import pytest
from conftest import GOLDEN

import convit_jax
from configs import finetune
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings, settings_of
from convit_jax.training.plan import (
    canvas_sides,
    device_resizes,
    follow_weights,
    make_plan,
)
from convit_jax.weights import pretrained

WEIGHTS = GOLDEN / "convit_golden.safetensors"


def test_steps_epochs_and_evaluations(digits_config):
    digits_config.steps, digits_config.epochs, digits_config.eval_every = None, 3, 1.0
    plan = make_plan(digits_config, devices=1)
    assert plan.total_steps == 54  # 3 * 1437 / 80 = 53.9
    assert plan.eval_at == {18, 36, 54}
    assert plan.eval_steps == 1
    assert plan.epoch(18) == 18 * 80 / 1437
    digits_config.steps = 20  # the schedule stays
    plan = make_plan(digits_config, devices=1)
    assert (plan.total_steps, plan.epochs, plan.eval_at) == (20, 3, {18, 20})


def test_keeping_the_number_of_images_multiplies_the_epochs(digits_config):
    digits_config.steps, digits_config.epochs = None, 2
    digits_config.data.sampling_ratio = 0.1
    few = make_plan(digits_config, devices=1)
    digits_config.data.keep_total_images = True
    kept = make_plan(digits_config, devices=1)
    images = len(kept.train.slots.indices)
    assert kept.epochs == round(2 * 1437 / images, 6)
    assert images == 139  # of ten classes of 138 to 147, each int(n * 0.1)
    assert few.total_steps == -(-2 * images // 80)
    assert kept.eval_at == {kept.total_steps}  # eval_every grows with the epochs
    assert kept.total_steps == -(-2 * 1437 // 80)  # as many images as without sampling


def test_fewer_classes_and_images_make_a_smaller_head_test_and_training(digits_config):
    digits_config.data.num_classes, digits_config.data.sampling_ratio = 3, 0.1
    digits_config.batch_size, digits_config.eval_batch_size = 8, 16
    plan = make_plan(digits_config, devices=1)
    assert plan.model["num_classes"] == 3
    assert len(plan.test.indices) == 3 * 36
    labels, epoch = plan.train.source.labels, plan.train.slots.epoch_length
    drawn = np.array(sorted({plan.train.slots.example(slot) for slot in range(2 * epoch)}))
    assert np.bincount(labels[drawn]).tolist() == [int(0.1 * count) for count in np.bincount(labels)[:3]]


def test_batches_and_warm_up_fit_the_data_and_the_run(digits_config):
    digits_config.batch_size, digits_config.optim.warmup_epochs, digits_config.epochs = None, None, 40
    digits_config.eval_batch_size = 110  # rounded up to a multiple of 8 devices
    plan = make_plan(digits_config, devices=8)
    assert (plan.batch_size, plan.eval_batch_size, plan.warmup_epochs) == (64, 112, 2)
    digits_config.data.sampling_ratio = 0.03
    digits_config.data.num_classes = 3
    plan = make_plan(digits_config, devices=1)
    assert len(plan.train.slots.indices) == 12
    assert (plan.batch_size, plan.eval_batch_size) == (8, 108)
    with pytest.raises(UserError, match="batch_size is 8, which 3 devices x 1 micro-batches do not divide"):
        make_plan(digits_config, devices=3)


def test_what_the_config_leaves_to_the_weights():
    config = finetune.get_config()
    config.init_from = str(WEIGHTS)
    of_weights = pretrained.load(WEIGHTS).settings
    followed = follow_weights(config)
    assert settings_of(followed.model, num_classes=10) == of_weights | {"drop_path_rate": 0.1}
    assert (config.model.name, followed.model.name, followed.data.mean[0]) == (None, "convit_tiny", 0.485)
    config.model.image_size, config.data.mean = 384, (0.5, 0.5, 0.5)  # what is set counts
    followed = follow_weights(config)
    assert (followed.model.image_size, followed.data.mean, followed.data.crop_ratio) == (384, (0.5, 0.5, 0.5), 0.875)
    config.init_from = None
    with pytest.raises(UserError, match=r"init_from is None, but the config takes data\.std from its weights"):
        follow_weights(config)


@pytest.mark.parametrize("name", convit_jax.list_models())
def test_a_network_is_named_as_in_the_paper(name):
    settings = model_settings(name, image_size=384, num_classes=3)
    assert pretrained.as_arguments(settings) == {"name": name, "image_size": (384, 384)}


@pytest.mark.parametrize(
    ("field", "value", "devices", "message"),
    [
        ("batch_size", 100, 8, "batch_size is 100, which 8 devices x 1 micro-batches do not divide"),
        ("accumulate", 3, 1, "1 devices x 3 micro-batches do not divide: use a multiple of 3, or"),
        ("epochs", 0, 1, r"epochs is 0 .*: it must be in \(0, inf\)"),
        ("seed", 2**32, 1, "seed is 4294967296"),
        ("augment.erase_prob", float("nan"), 1, "augment.erase_prob is nan"),
        ("augment.policy", "randaug", 1, "is 'randaug', did you mean 'randaugment'"),
        ("optim.schedule_per", "batch", 1, r"optim.schedule_per is 'batch'.* Choose from: epoch, step"),
        ("optim.freeze", "head", 1, "optim.freeze is 'head': choose none, backbone or 1 to 3 leading blocks"),
        ("optim.freeze", 4, 1, "optim.freeze is 4: choose"),
        ("data.dir", "images", 1, "data.dir is set, but data.name=digits reads no files"),
        ("data.mean", (0.5,), 1, r"data.mean is \(0.5,\): give 3 numbers"),
        ("data.std", (0.5, 0.0, 0.5), 1, r"data.std is \(0.5, 0.0, 0.5\)"),
        ("distill.alpha", 0.9, 1, "distill.alpha is set, which only distill.teacher uses: add that"),
        ("distill.temperature", 3.0, 1, "distill.temperature is set, which only distill.kind=soft uses"),
        ("model.num_classes", 5, 1, "model.num_classes is 5, but the data has 10 classes"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_starts(digits_config, field, value, devices, message):
    digits_config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        make_plan(digits_config, devices=devices)


def test_canvases_have_room_for_the_crops_of_an_image(digits_config):
    data = digits_config.data
    assert canvas_sides(data, (224, 224)) == (512, 384)
    data.repeats = 3
    assert canvas_sides(data, (320, 448)) == (896, 672)
    data.canvas = 500
    assert canvas_sides(data, (224, 224)) == (500, 375)
    data.canvas = 15
    with pytest.raises(UserError, match=r"data\.canvas is 15, but 3 crops of 8 pixels need 16: .*resize=host"):
        make_plan(digits_config, devices=1, on_device=True)
    assert not device_resizes(digits_config, "bicubic")  # on a CPU
    data.resize = "device"
    assert device_resizes(digits_config, "bicubic")
    data.resize = "auto"  # a run that continues keeps what it began with; before this choice the host resized
    assert device_resizes(digits_config, "bicubic", {"resize": "device"})
    assert not device_resizes(digits_config, "bicubic", {})
    data.resize = "device"
    with pytest.raises(UserError, match=r"resized with bilinear, but data\.resize=device is bicubic"):
        device_resizes(digits_config, "bilinear")
