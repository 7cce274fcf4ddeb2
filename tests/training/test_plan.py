"""What a config amounts to, and what is said of one that cannot work."""

import json

import pytest

from convit_jax.config import flatten
from convit_jax.errors import UserError
from convit_jax.rundir import check_same_config, claim_run
from convit_jax.training.plan import check, make_plan


def test_steps_epochs_and_evaluations(digits_config):
    digits_config.steps, digits_config.epochs, digits_config.eval_every = None, 3, 1.0
    plan = make_plan(digits_config, devices=1)
    assert plan.total_steps == 54  # 3 * 1437 / 80 = 53.9
    assert plan.eval_at == {18, 36, 54}
    assert plan.eval_steps == 1
    assert plan.epoch(18) == 18 * 80 / 1437


def test_a_cap_on_steps_leaves_the_schedule_alone(digits_config):
    digits_config.epochs, digits_config.steps = 10, 20
    plan = make_plan(digits_config, devices=1)
    assert (plan.total_steps, plan.epochs) == (20, 10)
    assert plan.eval_at == {20}


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


def test_fewer_classes_make_a_smaller_head_and_a_smaller_test(digits_config):
    digits_config.data.num_classes = 3
    plan = make_plan(digits_config, devices=1)
    assert plan.model["num_classes"] == 3
    assert len(plan.test.indices) == 3 * 36


@pytest.mark.parametrize(
    ("field", "value", "devices", "message"),
    [
        ("batch_size", 100, 8, "batch_size is 100, which 8 devices do not divide: use 96 or 104"),
        ("batch_size", 4, 8, "use 8,"),
        ("eval_batch_size", 9, 2, "eval_batch_size is 9, which 2 devices do not divide: use 8 or 10"),
        ("accumulate", 3, 1, "1 devices x 3 micro-batches do not divide: use 78 or 81"),
        ("accumulate", 0, 1, "accumulate is 0: it must be at least 1"),
        ("epochs", 0, 1, "both must be above 0"),
        ("steps", 0, 1, "steps is 0"),
        ("optim.schedule_per", "batch", 1, "optim.schedule_per is 'batch': choose epoch or step"),
        ("augment.crop", "centre", 1, "augment.crop is 'centre': choose resized or pad"),
        ("data.name", "digit", 1, "data.name is 'digit', did you mean 'digits'"),
        ("data.sampling_ratio", 1.5, 1, "data.sampling_ratio is 1.5"),
        (
            "augment.policy",
            "rand",
            1,
            "augment.policy is 'rand': choose randaugment or three_augment or none",
        ),
        ("augment.num_ops", -1, 1, "augment.num_ops is -1: it must be between 0 and 15"),
        ("augment.magnitude", 11.0, 1, "augment.magnitude is 11.0: it must be between 0 and 10"),
        ("augment.magnitude_std", -0.5, 1, "augment.magnitude_std is -0.5: it must be between 0 and 10"),
        ("augment.color_jitter", 1.5, 1, "augment.color_jitter is 1.5: it must be between 0 and 1"),
        ("augment.erase_prob", float("nan"), 1, "augment.erase_prob is nan: it must be between 0 and 1"),
        ("augment.mixup", -0.1, 1, "augment.mixup is -0.1: it must be at least 0, which is off"),
        ("augment.cutmix", float("nan"), 1, "augment.cutmix is nan: it must be at least 0, which is off"),
        ("augment.mix_prob", 1.5, 1, "augment.mix_prob is 1.5: it must be between 0 and 1"),
        ("augment.mix_switch_prob", -1.0, 1, "augment.mix_switch_prob is -1.0: it must be between 0 and 1"),
        ("augment.label_smoothing", 1.0, 1, "label_smoothing is 1.0: it must be at least 0 and below 1"),
        ("optim.ema_decay", 9.9, 1, "optim.ema_decay is 9.9: it must be at least 0 and below 1"),
        ("data.crop_ratio", 0.0, 1, "data.crop_ratio is 0.0: it must be above 0 and at most 1"),
        ("data.crop_ratio", 1.1, 1, "data.crop_ratio is 1.1: it must be above 0 and at most 1"),
        ("data.mean", (0.5,), 1, r"data.mean is \(0.5,\): it must have 3 numbers: red, green and blue"),
        ("data.std", (0.5,) * 4, 1, "it must have 3 numbers: red, green and blue"),
        ("data.std", (0.5, 0.0, 0.5), 1, r"data.std is \(0.5, 0.0, 0.5\): its numbers must be above 0"),
        ("distill.kind", "soft", 1, "distill.kind is 'soft', but there is no teacher: add distill.teacher"),
        ("distill.alpha", 0.9, 1, "distill.alpha is 0.9, but there is no teacher: add distill.teacher"),
        ("distill.temperature", 3.0, 1, "distill.temperature is 3.0, but only kind=soft has one: add"),
        ("distill.kind", "head", 1, "distill.kind is 'head': choose hard or soft"),
        ("distill.alpha", 1.5, 1, "distill.alpha is 1.5: it must be between 0 and 1"),
        ("distill.temperature", 0.0, 1, "distill.temperature is 0.0: it must be above 0"),
        ("model.num_classes", 5, 1, "model.num_classes is 5, but the data has 10 classes"),
        ("model.patch_size", 3, 1, "image_size 8 x 8 is not a multiple of patch_size 3"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(digits_config, field, value, devices, message):
    digits_config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        make_plan(digits_config, devices=devices)


def test_a_distilled_run_may_leave_its_teacher_idle(digits_config):
    digits_config.distill.teacher, digits_config.distill.alpha = "anything", 0.0
    check(digits_config, devices=1)


def test_a_run_directory_belongs_to_one_config(digits_config, tmp_path):
    images = dict(train_images=1437, test_images=360, classes=10)
    claim_run(tmp_path, digits_config, images)
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    digits_config.steps, digits_config.data.workers, digits_config.mesh.fsdp = 99, 5, 2
    digits_config.model.remat, digits_config.eval_every = True, 3.0
    claim_run(tmp_path, digits_config, images)  # none of these changes a number
    digits_config.optim.lr, digits_config.seed = 1.0, 5
    with pytest.raises(UserError, match=r"another config \(optim.lr was 0.008, is 1.0; seed was 0, is 5\)"):
        claim_run(tmp_path, digits_config, images)
    digits_config.optim.lr, digits_config.seed = 0.008, 0
    with pytest.raises(UserError, match="had train_images 1,437, now there are 1,436"):
        claim_run(tmp_path, digits_config, {**images, "train_images": 1436})
    images["image_lists"] = ["a", "b"]  # which run.json has not had before
    claim_run(tmp_path, digits_config, images)
    with pytest.raises(UserError, match="had images of other names, labels or classes than those now given"):
        claim_run(tmp_path, digits_config, {**images, "image_lists": ["a", "c"]})


def test_a_run_that_saved_nothing_takes_another_config(digits_config, tmp_path):
    claim_run(tmp_path, digits_config, dict(train_images=1437, test_images=360, classes=10))
    (tmp_path / "checkpoints").mkdir()
    digits_config.batch_size = 40
    claim_run(tmp_path, digits_config, dict(train_images=99, test_images=360, classes=10))
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 40
    assert json.loads((tmp_path / "run.json").read_text())["train_images"] == 99


def test_a_run_that_has_lost_its_checkpoints_keeps_its_log(digits_config, tmp_path):
    facts = dict(train_images=1437, test_images=360, classes=10)
    claim_run(tmp_path, digits_config, facts)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "train_loss": 2.3}\n')
    claim_run(tmp_path, digits_config, facts)  # never saved, so nothing is lost
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "val_top1": 50.0}\n')
    with pytest.raises(UserError, match=r"holds a run without its checkpoints.* remove metrics.jsonl"):
        claim_run(tmp_path, digits_config, facts)


def test_a_field_that_a_run_did_not_know_was_at_its_default(digits_config, tmp_path):
    saved = json.loads(digits_config.to_json_best_effort())
    del saved["optim"]["clip_norm"], saved["locality"]
    check_same_config(digits_config, saved, tmp_path)
    digits_config.optim.clip_norm = 1.0
    with pytest.raises(UserError, match=r"another config \(optim.clip_norm was 0.0, is 1.0\)"):
        check_same_config(digits_config, saved, tmp_path)


def test_a_run_directory_that_cannot_be_made(digits_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory\): check the path and its permissions"):
        claim_run(tmp_path / "file" / "run", digits_config, {})


def test_a_flat_config_is_what_json_gives_back(digits_config):
    flat = flatten(digits_config)
    assert flat["data.mean"] == [0.305, 0.305, 0.305]
    assert flat["steps"] == 12
    assert flat["model.qkv_bias"] is None
