"""What the line of an evaluation tells of attention, and on which images."""

import dataclasses

import numpy as np
from conftest import saved
from flax import nnx

from convit_jax.analysis import locality
from convit_jax.data.augment import normalize
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.rundir import read_metrics
from convit_jax.training.attention_log import image_count, make_attention_log, spread_images
from convit_jax.training.loop import train
from convit_jax.training.plan import make_plan
from convit_jax.training.sharding import make_mesh


def test_every_evaluation_logs_what_the_weights_look_at(digits_config, tmp_path, capsys):
    digits_config.locality.images, digits_config.locality.as_logged = 5, True
    digits_config.eval_every = 0.25
    digits_config.eval_batch_size = 77
    last = train(digits_config, tmp_path)
    assert "gates" not in capsys.readouterr().out.partition("First step")[2]  # the progress line stays short

    plan = make_plan(digits_config, devices=1)
    model = nnx.merge(abstract_model(plan.model)[0], saved(tmp_path)["state"]["params"])
    images = normalize(
        spread_images(plan.test, 5, devices=1)["image"], digits_config.data.mean, digits_config.data.std
    )
    centres, spans = locality.centres_and_spans(model)
    expected = {
        "gates": model.gpsa_blocks.attn.gates(),
        "centre_x": centres[..., 0],
        "centre_y": centres[..., 1],
        "span": spans,
        "nonlocality": locality.nonlocality(model, images),
        "nonlocality_as_logged": locality.nonlocality(model, images, as_logged=True),
    }
    for name, values in expected.items():
        assert np.shape(last[name]) == (3 if name.startswith("nonlocality") else 2, 4)
        np.testing.assert_allclose(last[name], values, atol=6e-5, err_msg=name)
    assert last["nonlocality"] != last["nonlocality_as_logged"]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    evaluations = [line for line in lines if "val_top1" in line]
    assert len(evaluations) == 3
    assert all(set(expected) <= set(line) for line in (lines[0], *evaluations))
    assert lines[0]["step"] == 0  # new weights
    np.testing.assert_allclose(lines[0]["gates"], 0.7311, atol=1e-4)
    assert not any("gates" in line for line in lines if "train_loss" in line)


def measured(config):
    """What is logged of new weights."""
    plan, mesh = make_plan(config, devices=1), make_mesh(1, 1)
    graphdef, _ = abstract_model(plan.model)
    return make_attention_log(graphdef, config, plan, mesh)(initial_params(plan.model, 0))


def test_what_the_model_or_the_config_has_not_is_left_out(digits_config):
    digits_config.locality.images = 0
    assert set(measured(digits_config)) == {"gates", "centre_x", "centre_y", "span"}
    digits_config.locality.images = None
    digits_config.model.name, digits_config.model.local_up_to_layer = "deit_tiny", 0
    assert set(measured(digits_config)) == {"nonlocality"}


def test_how_many_images(digits_config):
    assert [image_count(digits_config, count) for count in (6, 360, 2000, 50_000)] == [1, 4, 20, 64]
    digits_config.locality.images = 30
    assert [image_count(digits_config, count) for count in (6, 360)] == [6, 30]


def test_images_of_all_classes_are_looked_at(digits_config):
    test = make_plan(digits_config, devices=1).test
    labels = np.concatenate([test([slot])["label"] for slot in range(len(test.indices))])
    assert np.all(np.diff(labels) >= 0)  # the first ones are of one class
    pixels = spread_images(test, 20, devices=1)["image"]
    chosen = np.linspace(0, len(labels), 21).astype(int)[:-1]
    np.testing.assert_array_equal(pixels, test(chosen)["image"])
    assert set(labels[chosen]) == set(range(10))


def test_the_first_readable_image_of_each_part_whoever_reads_them(digits_config, image_folder, monkeypatch):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size = digits_config.eval_batch_size = 8
    example = make_plan(digits_config, devices=1).test
    whole = example(range(6))
    (image_folder / "val/ant/0.jpg").write_bytes(b"no image")
    one = spread_images(example, 3, devices=1)
    np.testing.assert_array_equal(one["image"], whole["image"][[1, 2, 4]])
    assert one["valid"].all()
    few = dataclasses.replace(example, indices=example.indices[:2])
    assert spread_images(few, 2, devices=1)["valid"].tolist() == [True]
    monkeypatch.setattr("jax.process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        parts.append(spread_images(example, 3, devices=4))
    np.testing.assert_array_equal(np.concatenate([part["image"] for part in parts])[:3], one["image"])
    assert [part["valid"].tolist() for part in parts] == [[True, True], [True, False]]
