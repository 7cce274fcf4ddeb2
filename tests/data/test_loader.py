"""Slots, and the streams that Grain makes of them with threads, workers and processes."""

import multiprocessing
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from convit_jax.data.images import centre_crop, decode
from convit_jax.data.loader import TRIES, EvalExample, Slots, TrainExample, Unreadable, batches
from convit_jax.data.sources import Digits, ImageFolder
from convit_jax.errors import UserError

IMAGES_PER_CLASS = 6


def write_folder(root, images_per_class=IMAGES_PER_CLASS):
    """Two classes of noise images, each image of its own size."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for class_name in ("a", "b"):
            (root / split / class_name).mkdir(parents=True)
            for number in range(images_per_class):
                pixels = rng.integers(0, 256, (40 + number, 50 - number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / class_name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The training split of an image folder."""
    return ImageFolder(write_folder(tmp_path_factory.mktemp("images")), "train")


@pytest.fixture(scope="module")
def digits():
    return Digits("test")


def collect(example, **settings):
    """The batches as copies in plain arrays."""
    return [
        {name: np.array(value) for name, value in batch.items()} for batch in batches(example, **settings)
    ]


def assert_same_batches(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def epoch_of(slots, epoch):
    first = epoch * slots.epoch_length
    return [slots.example(slot) for slot in range(first, first + slots.epoch_length)]


@pytest.mark.parametrize("indices", [[4, 9], [0, 3, 5, 8, 11, 17, 18], list(range(257))], ids=len)
def test_an_epoch_shows_every_image_of_the_subset_exactly_once(indices):
    slots = Slots(np.array(indices), seed=3)
    assert slots.epoch_length == len(indices)
    for epoch in (0, 1, 5):
        assert sorted(epoch_of(slots, epoch)) == indices


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = {tuple(epoch_of(Slots(np.arange(60), seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(60)) not in orders


def test_the_shuffle_puts_every_image_at_every_place_about_equally_often():
    slots = Slots(np.arange(8), seed=0)
    first = np.bincount([slots.example(8 * epoch) for epoch in range(400)], minlength=8)
    assert np.abs(first / 400 - 1 / 8).max() < 0.07  # four standard deviations


def test_the_order_is_a_function_of_seed_and_slot_alone():
    slots = range(150)
    forwards = [Slots(np.arange(40), 5).example(slot) for slot in slots]
    one = Slots(np.arange(40), 5)
    backwards = [one.example(slot) for slot in reversed(slots)]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize(
    ("count", "length"), [(2, 2), (255, 255), (256, 256), (300, 256), (511, 256), (700, 512)]
)
def test_repeated_augmentation_cuts_an_epoch_to_a_multiple_of_256(count, length):
    assert Slots(np.arange(count), 0, repeats=3).epoch_length == length
    assert Slots(np.arange(count), 0).epoch_length == count


@pytest.mark.parametrize("count", [30, 100, 300])
def test_repeated_augmentation_shows_an_image_three_times_in_a_row_and_a_third_of_them(count):
    slots = Slots(np.arange(1000, 1000 + count), 0, repeats=3)
    epochs = [epoch_of(slots, epoch) for epoch in range(2)]
    for shown in epochs:
        distinct = shown[::3]
        assert [image for image in distinct for _ in range(3)][: len(shown)] == shown
        assert len(set(distinct)) == len(distinct) == -(-slots.epoch_length // 3)
        assert set(distinct) <= set(slots.indices.tolist())
    assert set(epochs[0]) != set(epochs[1])


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_subset_of_one_image_shows_it_in_every_slot(repeats):
    slots = Slots(np.array([7]), seed=0, repeats=repeats)
    assert slots.epoch_length == 1
    assert {slots.example(slot) for slot in range(9)} == {7}


def test_training_batches_run_on_across_the_borders_of_epochs(digits):
    example = TrainExample(digits, Slots(np.arange(40, 50), 0), (8, 8), "pad")
    shown = np.concatenate([b["image"] for b in collect(example, batch_size=4, start=0, stop=5)])
    assert shown.shape == (20, 8, 8, 3)
    for epoch in (shown[:10], shown[10:]):
        assert sorted(image.tobytes() for image in epoch) == sorted(
            digits[i].tobytes() for i in range(40, 50)
        )


def test_a_training_batch_is_uint8_images_with_their_int32_labels(digits):
    example = TrainExample(digits, Slots(np.arange(360), 0), (8, 8), "pad")
    (batch,) = collect(example, batch_size=16, start=2, stop=3)
    assert batch.keys() == {"image", "label", "unreadable"}
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (16, 8, 8, 3))
    assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (16,))
    shown = [example.slots.example(slot) for slot in range(32, 48)]
    np.testing.assert_array_equal(batch["image"], digits.images[shown])
    np.testing.assert_array_equal(batch["label"], digits.labels[shown])


def test_training_with_shifts_shows_what_the_test_shows(folder):
    """The geometry of an image that is not square is the same; one of the right size stays as it is."""
    slots = Slots(np.arange(12), 0)
    (trained,) = collect(TrainExample(folder, slots, (16, 16), "pad"), batch_size=12, start=0, stop=1)
    shown = np.array([slots.example(slot) for slot in range(12)])
    (tested,) = collect(EvalExample(folder, shown, (16, 16), 1.0), batch_size=12, start=0, stop=1)
    np.testing.assert_array_equal(trained["image"], tested["image"])
    image = np.asarray(decode(folder[4], "image"))
    example = TrainExample(folder, Slots(np.array([4]), 0), image.shape[:2], "pad")
    np.testing.assert_array_equal(example([0])["image"][0], image)


def signal_workers(count, before):
    """Send Ctrl-C and SIGTERM, which may reach all processes, to so many workers as soon as they are born."""
    told = set()
    deadline = time.monotonic() + 30
    while len(told) < count and time.monotonic() < deadline:
        for worker in {*multiprocessing.active_children()} - before - told:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
            told.add(worker)
        time.sleep(0.002)
    return len(told)


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_load_the_same_stream_as_threads_though_signals_reach_them(workers, folder):
    example = TrainExample(folder, Slots(np.arange(12), 1), (8, 10), "resized")
    settings = dict(batch_size=6, start=1, stop=6)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(signal_workers, workers, {*multiprocessing.active_children()})
        assert_same_batches(collect(example, workers=workers, **settings), collect(example, **settings))
        assert told.result() == workers


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_run_that_starts_at_a_step_continues_the_stream_from_the_beginning(start, folder):
    example = TrainExample(folder, Slots(np.arange(12), 0, repeats=3), (8, 8), "resized")
    whole = collect(example, batch_size=5, start=0, stop=7)
    assert_same_batches(collect(example, batch_size=5, start=start, stop=7), whole[start:])


def test_a_longer_run_begins_with_the_same_batches(folder):
    example = TrainExample(folder, Slots(np.arange(12), 0), (8, 8), "resized")
    assert_same_batches(
        collect(example, batch_size=4, start=0, stop=9)[:2], collect(example, batch_size=4, start=0, stop=2)
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_the_processes_together_load_the_rows_of_one(processes, folder):
    example = TrainExample(folder, Slots(np.arange(12), 0), (8, 8), "resized")
    settings = dict(batch_size=6, start=2, stop=5)
    shares = [collect(example, process=p, processes=processes, **settings) for p in range(processes)]
    assert all(len(batch["label"]) == 6 // processes for share in shares for batch in share)
    together = [
        {name: np.concatenate([rows[name] for rows in step]) for name in step[0]}
        for step in zip(*shares, strict=True)
    ]
    assert_same_batches(together, collect(example, **settings))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [360, 72, 100, 512])
def test_evaluation_counts_every_image_exactly_once_at_any_batch_size(batch_size, processes, digits):
    example = EvalExample(digits, np.arange(360), (8, 8), 1.0)
    steps = -(-360 // batch_size)
    settings = dict(batch_size=batch_size, start=0, stop=steps, processes=processes)
    shares = [collect(example, process=p, **settings) for p in range(processes)]
    rows = [share[step] for step in range(steps) for share in shares]
    image, label, valid = (np.concatenate([b[name] for b in rows]) for name in ("image", "label", "valid"))
    assert {len(b["valid"]) for b in rows} == {batch_size // processes}
    assert (valid.dtype, label.dtype, image.dtype) == (bool, np.int32, np.uint8)
    assert len(valid) == steps * batch_size
    np.testing.assert_array_equal(image[valid], digits.images)
    np.testing.assert_array_equal(label[valid], digits.labels)


def test_evaluation_of_a_subset_shows_its_images_only(folder):
    indices = np.array([1, 4, 9])
    (batch,) = collect(EvalExample(folder, indices, (8, 8), 0.875), batch_size=4, start=0, stop=1)
    assert batch["valid"].tolist() == [True, True, True, False]
    assert batch["label"][:3].tolist() == folder.labels[indices].tolist()
    for row, index in enumerate(indices):
        expected = centre_crop(decode(folder[index], "image"), (8, 8), 0.875)
        np.testing.assert_array_equal(batch["image"][row], expected)


def break_images(root, *names):
    for name in names:
        (root / name).write_bytes(b"not an image")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_training_image_is_replaced_by_the_next_one_and_reported(workers, tmp_path):
    root = write_folder(tmp_path, images_per_class=4)
    example = TrainExample(ImageFolder(root, "train"), Slots(np.arange(8), 0, repeats=2), (8, 8), "pad")
    whole = example(range(16))
    assert (whole["unreadable"] == -1).all()
    break_images(root, "train/a/2.png", "train/a/3.png")
    steps = collect(example, batch_size=4, start=0, stop=4, workers=workers)
    damaged = {name: np.concatenate([batch[name] for batch in steps]) for name in whole}
    wanted = np.array([example.slots.example(slot) for slot in range(16)])
    broken = np.isin(wanted, (2, 3))
    assert 0 < broken.sum() < 16
    np.testing.assert_array_equal(damaged["unreadable"], np.where(broken, wanted, -1))
    np.testing.assert_array_equal(damaged["image"][~broken], whole["image"][~broken])
    np.testing.assert_array_equal(damaged["label"][~broken], whole["label"][~broken])
    (next_one,) = example.source.labels.searchsorted([1])  # the first readable one, of the other class
    shown = centre_crop(decode(example.source[next_one], "image"), (8, 8), 1.0)
    assert (damaged["image"][broken] == shown).all()
    assert (damaged["label"][broken] == 1).all()


def test_when_nothing_can_be_read_any_more_the_stream_ends_with_the_reason(tmp_path):
    root = write_folder(tmp_path, images_per_class=TRIES)
    break_images(root, *(f"train/{name}/{n}.png" for name in "ab" for n in range(TRIES)))
    example = TrainExample(ImageFolder(root, "train"), Slots(np.arange(2 * TRIES), 0), (8, 8), "pad")
    with pytest.raises(UserError, match=r"cannot decode.*png.*replace or remove"):
        collect(example, batch_size=4, start=0, stop=1)


def test_an_unreadable_test_image_does_not_count(tmp_path):
    root = write_folder(tmp_path, images_per_class=3)
    break_images(root, "train/b/1.png")
    example = EvalExample(ImageFolder(root, "train"), np.arange(6), (8, 8), 1.0)
    (batch,) = collect(example, batch_size=8, start=0, stop=1)
    assert batch["valid"].tolist() == [True, True, True, True, False, True, False, False]
    assert batch["unreadable"].tolist() == [-1, -1, -1, -1, 4, -1, -1, -1]


def test_unreadable_images_are_named_once_and_too_many_of_them_stop_the_run(tmp_path):
    root = write_folder(tmp_path)
    break_images(root, "train/a/1.png", "train/b/0.png", "train/b/5.png")
    said = []
    unreadable = Unreadable(ImageFolder(root, "train"), 2, said.append)

    def batch(*indices):
        return {"label": np.zeros(4), "unreadable": np.array(indices)}

    for indices in ((-1, -1, -1, -1), (1, 1, -1, 1), (-1, 1, 6, -1)):
        assert unreadable.take(batch(*indices)).keys() == {"label"}
    assert len(said) == 2
    assert re.match(r"cannot decode the image a/1\.png .*\(1 of at most 2", said[0])
    assert re.match(r"cannot decode the image b/0\.png .*\(2 of at most 2", said[1])
    with pytest.raises(UserError, match=r"b/5\.png .*one more than data\.max_unreadable=2 allows\.$"):
        unreadable.take(batch(-1, -1, -1, 11))


def test_the_crop_of_a_slot_is_a_function_of_seed_and_slot_alone(folder):
    def crops(seed, slots):
        example = TrainExample(folder, Slots(np.array([3]), seed), (9, 8), "resized")
        return {slot: example([slot])["image"].tobytes() for slot in slots}

    forwards = crops(0, range(20))
    assert crops(0, reversed(range(20))) == forwards
    assert len(set(forwards.values())) > 15  # two of 20 may agree by chance
    assert len(set(crops(1, range(20)).values()) & set(forwards.values())) < 5


def test_repeats_of_an_image_differ_in_their_crops(folder):
    example = TrainExample(folder, Slots(np.arange(12), 0, repeats=3), (8, 8), "resized")
    three = example(range(3))
    assert len({*three["label"].tolist()}) == 1
    assert len({image.tobytes() for image in three["image"]}) == 3


def test_neighbouring_repeats_read_their_image_once(folder):
    class Counting:
        labels, names, reads = folder.labels, folder.names, 0

        def __getitem__(self, index):
            self.reads += 1
            return folder[index]

    source = Counting()
    batch = TrainExample(source, Slots(np.arange(12), 0, repeats=3), (8, 8), "resized")(range(12))
    assert source.reads == 4
    alone = TrainExample(folder, Slots(np.arange(12), 0, repeats=3), (8, 8), "resized")
    for slot in range(12):
        np.testing.assert_array_equal(alone([slot])["image"][0], batch["image"][slot])
