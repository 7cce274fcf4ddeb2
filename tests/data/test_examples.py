"""The order of training images, the rows of training and evaluation batches, unreadable images."""

import numpy as np
import pytest

from convit_jax.data import examples
from convit_jax.data.examples import TRIES, EvalExample, Slots, TrainExample, Unreadable
from convit_jax.data.images import centre_crop, decode
from convit_jax.data.sources import Digits, ImageFolder
from convit_jax.errors import UserError


@pytest.fixture
def folder(image_folder):
    """18 training images of 20 x 24 pixels in three classes."""
    return ImageFolder(image_folder, "train")


def epoch_of(slots, epoch):
    first = epoch * slots.epoch_length
    return [slots.example(slot) for slot in range(first, first + slots.epoch_length)]


def test_each_epoch_shows_the_subset_once_in_an_order_of_seed_and_epoch():
    orders = {tuple(epoch_of(Slots(np.arange(9, 60), seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(9, 60)) for order in orders)
    slots = Slots(np.arange(8), seed=0)
    first = np.bincount([slots.example(8 * epoch) for epoch in range(400)], minlength=8)
    assert np.abs(first / 400 - 1 / 8).max() < 0.07  # four standard deviations
    slots = Slots(np.arange(40), seed=5)
    assert [slots.example(slot) for slot in range(149, -1, -1)][:-6:-1] == [31, 21, 12, 9, 27]  # in every version


@pytest.mark.parametrize(("count", "length"), [(1, 1), (255, 255), (256, 256), (700, 512)])
def test_repeated_augmentation_shows_a_third_of_the_images_three_times_in_a_row(count, length):
    slots = Slots(np.arange(1000, 1000 + count), 0, repeats=3)
    assert slots.epoch_length == length
    shown = epoch_of(slots, 0)
    distinct = shown[::3]
    assert [image for image in distinct for _ in range(3)][:length] == shown
    assert len({*distinct} & {*slots.indices.tolist()}) == len(distinct) == -(-length // 3)
    assert count == 1 or epoch_of(slots, 1) != shown


def test_a_training_batch_holds_the_images_and_labels_of_its_slots():
    digits = Digits("test")
    example = TrainExample(digits, Slots(np.arange(40, 50), 0), (8, 8), "pad")
    batch = example(range(3, 18))  # over the border of an epoch
    assert [batch[name].dtype for name in ("image", "label", "unreadable")] == [np.uint8, np.int32, np.int64]
    shown = [example.slots.example(slot) for slot in range(3, 18)]
    np.testing.assert_array_equal(batch["image"], digits.images[shown])
    np.testing.assert_array_equal(batch["label"], digits.labels[shown])
    assert (batch["unreadable"] == -1).all()


def test_a_random_crop_depends_only_on_seed_and_slot(folder):
    def crops(seed, slots):
        example = TrainExample(folder, Slots(np.array([3]), seed), (9, 8), "resized")
        return {slot: example([slot])["image"].tobytes() for slot in slots}

    forwards = crops(0, range(20))
    assert crops(0, reversed(range(20))) == forwards
    assert len(set(forwards.values())) > 15  # two of 20 may agree by chance
    assert len(set(crops(1, range(20)).values()) & set(forwards.values())) < 5


def test_repeats_are_decoded_once_and_cropped_differently(folder, monkeypatch):
    example, decoded = TrainExample(folder, Slots(np.arange(18), 0, repeats=3), (8, 8), "resized"), []
    alone = [example([slot])["image"][0] for slot in range(12)]
    monkeypatch.setattr(examples, "decode", lambda *record: decoded.append(record) or decode(*record))
    batch = example(range(12))
    assert len(decoded) == 4
    assert len({image.tobytes() for image in batch["image"][:3]}) == 3
    np.testing.assert_array_equal(batch["image"], alone)


def damage(root, *names):
    for name in names:
        (root / name).write_bytes(b"not an image")


def test_an_unreadable_training_image_is_replaced_by_the_next_readable_one(image_folder, folder):
    example = TrainExample(folder, Slots(np.arange(18), 0), (8, 8), "pad")
    whole = example(range(18))
    damage(image_folder, "train/ant/4.jpg", "train/ant/5.jpg")
    damaged = example(range(18))
    wanted = np.array([example.slots.example(slot) for slot in range(18)])
    broken = np.isin(wanted, (4, 5))
    assert broken.sum() == 2
    np.testing.assert_array_equal(damaged["unreadable"], np.where(broken, wanted, -1))
    np.testing.assert_array_equal(damaged["image"][~broken], whole["image"][~broken])
    assert (damaged["image"][broken] == centre_crop(decode(folder[6], "image"), (8, 8), 1.0)).all()
    assert (damaged["label"][broken] == 1).all()
    damage(image_folder, *(f"train/{folder.name(index)}" for index in range(TRIES)))
    with pytest.raises(UserError, match=r"cannot decode.*jpg.*replace or remove"):
        TrainExample(folder, Slots(np.arange(TRIES), 0), (8, 8), "pad")([0])
    said = []
    Unreadable(folder, 1, said.append).take({"label": wanted, "unreadable": np.array([-1, 17])})
    assert said[0].startswith("the image cat/5.jpg could be read only the second time: check the disk.")


def test_evaluation_shows_its_subset_and_marks_other_rows_as_not_valid(image_folder, folder):
    damage(image_folder, "train/ant/4.jpg")
    indices = np.array([1, 4, 9])
    batch = EvalExample(folder, indices, (8, 8), 0.875)(range(5))
    assert batch["valid"].dtype == bool
    assert batch["valid"].tolist() == [True, False, True, False, False]
    assert batch["unreadable"].tolist() == [-1, 4, -1, -1, -1]
    for row in (0, 2):
        expected = centre_crop(decode(folder[indices[row]], "image"), (8, 8), 0.875)
        np.testing.assert_array_equal(batch["image"][row], expected)
        assert batch["label"][row] == folder.labels[indices[row]]
