"""A student with a teacher: DeiT's losses, what the teacher sees, whole runs, refused teachers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import assert_same, saved
from flax import nnx
from scipy.special import log_softmax

from convit_jax import load_pretrained
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, initial_params, model_settings
from convit_jax.rundir import read_metrics
from convit_jax.training.distill import load_teacher
from convit_jax.training.loop import train
from convit_jax.training.plan import make_plan
from convit_jax.training.setup import Steps
from convit_jax.training.sharding import make_mesh, put_batch
from convit_jax.training.step import augmented, step_keys
from convit_jax.weights import names, pretrained
from convit_jax.weights.formats import Pretrained, save_converted
from convit_jax.weights.preprocess import Preprocessing

DIGITS = tuple("0123456789")
LIKE_DIGITS = Preprocessing(crop_ratio=1.0, mean=(0.305,) * 3, std=(0.376,) * 3)


def make_teacher(path, *, preprocessing=LIKE_DIGITS, class_names=DIGITS, seed=7, **changed):
    """A small ConViT in a converted directory, whose answers depend on the image."""
    sizes = dict(image_size=8, patch_size=2, embed_dim=12, num_heads=4, depth=2, local_up_to_layer=1)
    settings = model_settings("convit_tiny", **{"num_classes": 10, **sizes, **changed})
    rng = np.random.default_rng(seed)

    def weights(path, leaf):
        if path[-1].key in ("kernel", "pos_embed"):
            return rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "gating_param"), np.float32)

    params = jax.tree_util.tree_map_with_path(weights, abstract_model(settings)[1])
    tensors = names.to_state_dict(params)
    save_converted(Pretrained(tensors, settings, preprocessing, class_names, str(path)), path)
    return str(path)


@pytest.fixture
def student(digits_config, tmp_path):
    """A config with a teacher, and all randomness on the student's side."""
    digits_config.locality.images = 0
    digits_config.steps, digits_config.log_every, digits_config.checkpoint_every = 6, 2, 3
    digits_config.augment.mixup, digits_config.augment.cutmix = 0.8, 1.0
    digits_config.model.drop_path_rate = 0.2
    digits_config.distill.teacher = make_teacher(tmp_path / "teacher")
    return digits_config


def one_step(config, *, taught=True):
    """(state, metrics) of a first step on 16 images, (model, images, soft labels) that went into it."""
    plan, mesh = make_plan(config, devices=1), make_mesh(1, 1)
    steps = Steps(config, plan, mesh, *(load_teacher(config, plan) if taught else ()))
    params, batch = initial_params(plan.model, 0), plan.train(range(16))
    tree = steps.first(params)
    new, metrics = steps.train(tree["state"], tree["metrics"], put_batch(batch, mesh))
    images, targets = augmented(batch, step_keys(config.seed, 0), config, 10)
    return new, metrics, (nnx.merge(steps.graphdef, params), images, np.asarray(targets))


def reference(for_labels, for_teacher, targets, teacher, *, kind, alpha, tau):
    """DeiT's DistillationLoss in numpy: (loss, distillation part)."""
    for_labels, for_teacher, teacher = (x.astype(np.float64) for x in (for_labels, for_teacher, teacher))
    base = -(targets * log_softmax(for_labels, axis=1)).sum(1).mean()
    if kind == "soft":
        ours, theirs = (log_softmax(x / tau, axis=1) for x in (for_teacher, teacher))
        part = (np.exp(theirs) * (theirs - ours)).sum() * (tau * tau) / for_teacher.size
    else:
        part = -log_softmax(for_teacher, axis=1)[np.arange(len(teacher)), teacher.argmax(1)].mean()
    return base * (1 - alpha) + part * alpha, part


@pytest.mark.parametrize(("kind", "distilled"), [("hard", True), ("soft", False)])
def test_the_loss_is_deits_also_of_a_run_as_teacher(trained, student, kind, distilled):
    student.model.distilled, student.model.drop_path_rate = distilled, 0.0
    if distilled:
        student.distill.teacher = str(trained)
    tau = 3.0 if kind == "soft" else 1.0
    student.distill.update(kind=kind, alpha=0.3, temperature=tau)
    _, metrics, (model, images, targets) = one_step(student)
    both = model.both_logits(images) if distilled else (model(images),) * 2
    for_labels, for_teacher = map(np.asarray, both)
    teacher = np.asarray(load_pretrained(student.distill.teacher)(images))
    loss, part = reference(for_labels, for_teacher, targets, teacher, kind=kind, alpha=0.3, tau=tau)
    assert np.ptp(teacher, axis=0).max() > 0.01  # depends on the image
    np.testing.assert_allclose(metrics["loss"] / 16, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["distill_loss"] / 16, part, rtol=1e-5)
    right = (for_labels + for_teacher).argmax(1) == targets.argmax(1)
    assert metrics["correct"] == right.sum()


def test_with_alpha_0_the_student_learns_what_it_learns_alone_also_in_micro_batches(student):
    student.distill.alpha, student.model.drop_path_rate = 0.0, 0.0
    alone, expected, _ = one_step(student, taught=False)
    student.accumulate = 4
    taught, metrics, _ = one_step(student)
    assert_same(taught["opt_state"], alone["opt_state"], rtol=1e-4, atol=1e-6)
    for name in ("loss", "correct"):
        np.testing.assert_allclose(expected[name], metrics[name], rtol=1e-5)


def taught_logits(config, images):
    """(Teacher, its logits) of a config for images normalised as the student's."""
    teacher, params = load_teacher(config, make_plan(config, devices=1))
    return teacher, np.asarray(teacher.logits(jax.device_put(params), images))


def test_the_teacher_has_its_own_normalisation_image_size_and_order_of_classes(student, tmp_path):
    pixels = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    ours = (pixels - 0.305) / 0.376
    how = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = make_teacher(tmp_path / "other", preprocessing=how, class_names=DIGITS[::-1], image_size=12)
    student.distill.teacher = path
    teacher, logits = taught_logits(student, ours)
    expected = load_pretrained(path, image_size=8)((pixels - np.float32(how.mean)) / np.float32(how.std))
    np.testing.assert_allclose(logits, np.asarray(expected)[:, ::-1], rtol=1e-4, atol=1e-4)
    assert teacher.facts["changes"] == [
        "position embedding resized from 6 x 6 to 4 x 4 patches",
        "images renormalised for it",
    ]


def test_a_teacher_of_more_classes_computes_in_the_students_dtype_and_without_its_drop_path(student, tmp_path):
    student.data.num_classes, student.model.dtype = 3, "bfloat16"
    student.distill.teacher = make_teacher(tmp_path / "dropping", drop_path_rate=0.9, drop_rate=0.5)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    _, logits = taught_logits(student, images)
    expected = load_pretrained(student.distill.teacher, dtype="bfloat16")(images)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected[:, :3])


def test_a_run_names_its_teacher_and_continues_on_eight_devices_where_it_has_moved(student, tmp_path):
    run, half = tmp_path / "run", tmp_path / "half"
    train(student, run)
    lines = read_metrics(run / "metrics.jsonl")
    assert all(0 < line["train_distill_loss"] != line["train_loss"] for line in lines if "lr" in line)
    teacher = json.loads((run / "run.json").read_text())["teacher"]
    tensors = pretrained.load(student.distill.teacher).tensors
    del tensors["pos_embed"]
    assert (teacher["source"], teacher["weights"]) == (student.distill.teacher, pretrained.fingerprint(tensors))
    assert set(saved(run)["state"]) == {"step", "params", "opt_state"}

    student.steps = 3
    train(student, half)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    student.distill.teacher = str(tmp_path / "moved")
    student.steps, student.mesh.data, student.mesh.fsdp = 6, 2, 4
    train(student, half)
    assert_same(saved(run), saved(half), atol=2e-5, rtol=1e-4)
    make_teacher(tmp_path / "moved", seed=8)
    with pytest.raises(UserError, match=r"had the teacher '.*moved'; '.*moved' has other weights"):
        train(student, half)
    student.distill.teacher = None
    with pytest.raises(UserError, match=r"had the teacher '.*moved'; None has other weights"):
        train(student, half)


def test_teachers_that_cannot_teach_are_refused_before_anything_is_written(student, tmp_path):
    student.distill.teacher = make_teacher(tmp_path / "refused", num_classes=12, class_names=None)
    with pytest.raises(UserError, match=r"the data has 10 classes, the student 10 and .*refused 12: leave"):
        train(student, tmp_path / "run")
    weights = Path(make_teacher(tmp_path / "cut")) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    student.distill.teacher = str(weights.parent)
    with pytest.raises(UserError, match=r"^distill.teacher: cannot read .*weights.safetensors"):
        train(student, tmp_path / "run")
    assert not (tmp_path / "run").exists()
