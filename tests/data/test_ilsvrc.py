"""The two tars of ImageNet: what whole and partial ones hold, and what is said of each kind of bad one."""

import gzip

import pytest

from convit_jax.data.ilsvrc import PUBLISHED, Contents, look_through, partial
from convit_jax.errors import UserError
from tests.tars import archive, write_ilsvrc

TRAIN, VALIDATION = (published.tar for published in PUBLISHED.values())


def val(*numbers):
    return {f"ILSVRC2012_val_{number:08d}.JPEG": b"image" for number in numbers}


@pytest.fixture
def tars(tmp_path):
    """Two classes with three and one image, four validation images."""
    train = [f"n01440764_{n}.JPEG" for n in (18, 36, 9)] + ["n15075141_7.JPEG"]
    write_ilsvrc(tmp_path, dict.fromkeys(train, b"image"), val(1, 2, 3, 4))
    return tmp_path


def message(folder):
    with pytest.raises(UserError) as caught:
        look_through(folder)
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said


def test_classes_come_in_the_order_of_the_tar_with_the_sizes_of_their_tars(tars):
    contents = look_through(tars)
    assert list(contents.classes.items()) == [("n01440764", 10240), ("n15075141", 10240)]
    assert contents.validation_images == 4
    assert contents.paths == {"train": tars / TRAIN, "validation": tars / VALIDATION}
    assert contents.bytes == {split: path.stat().st_size for split, path in contents.paths.items()}


def test_a_part_of_imagenet_is_told_split_by_split_and_the_whole_is_not(tars):
    train, validation = partial(look_through(tars))
    assert train.startswith(f"{TRAIN} has 30,720 bytes, not the published 147,897,477,120")
    assert "2 of 1,000 classes" in train
    assert "4 of 50,000 images" in validation
    whole = {split: published.bytes for split, published in PUBLISHED.items()}
    assert partial(Contents({}, whole, {}, 50_000)) == []
    assert len(partial(Contents({}, {**whole, "train": 1}, {}, 50_000))) == 1


def test_other_files_beside_the_tars_do_not_matter(tars):
    (tars / "ILSVRC2012_img_test.tar").write_bytes(b"")
    (tars / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    assert look_through(tars).validation_images == 4


@pytest.mark.parametrize("missing", [TRAIN, VALIDATION])
@pytest.mark.parametrize("name", ["imagenet_{}", "{}.part", "{}.tar"])
def test_a_missing_tar_is_named_with_what_may_be_it(tars, missing, name):
    (tars / missing).rename(tars / "elsewhere")
    assert f"has no {missing}: both tars are needed" in message(tars)
    (tars / "elsewhere").rename(tars / name.format(missing))
    assert f"({name.format(missing)} is there: if it is the whole of it, rename it)" in message(tars)


def test_a_folder_that_is_none_is_named(tars):
    assert f"{tars / 'none'} is no folder" in message(tars / "none")
    assert "as --tars" in message(tars / TRAIN)


def truncated(data):
    return data[: len(data.rstrip(b"\0")) // 2]


def without_end(data):
    return data.rstrip(b"\0")[:-300]


def broken_header(data):
    """The second member's header, as a bad block of the disk leaves it: tarfile takes it for the end."""
    start = 1024 if data[:14] == b"ILSVRC2012_val" else 512 + 10240
    return data[:start] + b"\xff" * 512 + data[start + 512 :]


def preallocated(data):
    """As a downloader leaves it that reserves the whole size."""
    return data + bytes(2 << 20)


@pytest.mark.parametrize("tar", [TRAIN, VALIDATION])
@pytest.mark.parametrize("damage", [truncated, without_end, broken_header, preallocated])
def test_a_tar_that_does_not_end_as_it_should_is_cut_off_or_damaged(tars, tar, damage):
    (tars / tar).write_bytes(damage((tars / tar).read_bytes()))
    said = message(tars)
    assert f"{tars / tar} is cut off or damaged" in said
    assert "download or copy it again" in said


@pytest.mark.parametrize("tar", [TRAIN, VALIDATION])
@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", bytes(512 * 4), gzip.compress(archive(val(1)))])
def test_what_is_no_tar_is_refused(tars, tar, data):
    (tars / tar).write_bytes(data)
    said = message(tars)
    assert str(tars / tar) in said
    assert "is not a tar file" in said or "holds no" in said


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (val(1), "holds 'ILSVRC2012_val_00000001.JPEG' where the tar of a class"),
        ({"train/n01440764/n01440764_1.JPEG": b"image"}, "not the tar of the training images"),
        ({"n01440764.tar": b"no tar" * 100}, "n01440764.tar in"),
        ({"n01440764.tar": archive({"n02119789_1.JPEG": b"image"})}, "begins with 'n02119789_1.JPEG'"),
        ({"n01440764.tar": archive({})}, "n01440764.tar in"),
        (
            {"n01440764.tar": archive({"n01440764_1.JPEG": b""}), "./n01440764.tar": b""},
            "n01440764.tar twice",
        ),
    ],
)
def test_a_training_tar_with_other_contents_is_refused(tars, files, said):
    (tars / TRAIN).write_bytes(archive(files))
    assert said in message(tars)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (val(1, 2, 4), "holds ILSVRC2012_val_00000004.JPEG but not ILSVRC2012_val_00000003.JPEG before it"),
        (val(2), "labels after a gap would be wrong"),
        ({"./ILSVRC2012_val_00000001.JPEG": b"image"}, "where an image such as 'ILSVRC2012_val"),
        ({"n01440764.tar": b""}, "not the tar of the validation images"),
    ],
)
def test_a_validation_tar_whose_labels_would_be_wrong_is_refused(tars, files, said):
    (tars / VALIDATION).write_bytes(archive(files))
    assert said in message(tars)


def test_more_validation_images_than_tfds_has_labels_for_are_refused(tars, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "validation", PUBLISHED["validation"]._replace(images=3))
    assert "holds 4 images, more than" in message(tars)
