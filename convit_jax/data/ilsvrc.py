"""The two tars of ImageNet (ILSVRC 2012) as image-net.org gives them, looked through before hours of work.

    ILSVRC2012_img_train.tar  n01440764.tar, ...: a tar for each of 1,000 classes, with n01440764_18.JPEG, ...
    ILSVRC2012_img_val.tar    ILSVRC2012_val_00000001.JPEG, ...: 50,000 images

Only headers are read. What must be seen here, because TFDS does not see it: a missing tar gives a data set
without that split, a broken header ends a tar early, and a gap in the validation images shifts their labels.
"""

import posixpath
import re
import tarfile
from difflib import get_close_matches
from typing import NamedTuple

from convit_jax.errors import UserError


class Published(NamedTuple):
    """What image-net.org publishes of a split."""

    tar: str
    bytes: int
    images: int


PUBLISHED = {
    "train": Published("ILSVRC2012_img_train.tar", 147_897_477_120, 1_281_167),
    "validation": Published("ILSVRC2012_img_val.tar", 6_744_924_160, 50_000),
}
PADDING = 1 << 20  # zeros that may follow the end of a tar; GNU tar fills up to 10 KB


class Contents(NamedTuple):
    """What the two tars hold.

    paths, bytes: {split: of the tar}. classes: {"n01440764": bytes of its tar} in the tar's order.
    validation_images: how many.
    """

    paths: dict
    bytes: dict
    classes: dict
    validation_images: int


def look_through(folder):
    """The Contents of the tars in a folder.

    Raises:
      UserError: a tar is missing, misnamed, cut off, unreadable, or holds something else.
    """
    paths = {split: _find(folder, published) for split, published in PUBLISHED.items()}
    classes = {}
    for tar, member in _members(paths["train"]):
        if member.isfile():  # TFDS passes over folders
            classes[_class_of(paths["train"], tar, member, classes)] = member.size
    names = sorted(member.name for _, member in _members(paths["validation"]))
    _check_validation(paths["validation"], names)
    if not classes:
        raise UserError(f"{paths['train']} holds no class: it is not the tar of the training images.")
    sizes = {split: path.stat().st_size for split, path in paths.items()}
    return Contents(paths, sizes, classes, len(names))


def partial(contents):
    """Sentences on what is not the whole of ImageNet; none if the tars have the published sizes."""
    held = {
        "train": f"{len(contents.classes):,} of 1,000 classes",
        "validation": f"{contents.validation_images:,} of {PUBLISHED['validation'].images:,} images",
    }
    return [
        f"{published.tar} has {contents.bytes[split]:,} bytes, not the published {published.bytes:,}: "
        f"taken as a part of ImageNet ({held[split]})."
        for split, published in PUBLISHED.items()
        if contents.bytes[split] != published.bytes
    ]


def _find(folder, published):
    """The path of a tar, or a UserError that names what is there instead."""
    if not folder.is_dir():
        tars = " and ".join(published.tar for published in PUBLISHED.values())
        raise UserError(f"{folder} is no folder: give the one that holds {tars} as --tars.")
    path = folder / published.tar
    if not path.is_file():
        expected = {p.tar for p in PUBLISHED.values()}
        others = sorted(file.name for file in folder.iterdir() if ".tar" in file.name.lower())
        near = get_close_matches(published.tar, [name for name in others if name not in expected], 1, 0.4)
        instead = f" ({near[0]} is there: if it is the whole of it, rename it)" if near else ""
        raise UserError(
            f"{folder} has no {published.tar}{instead}: both tars are needed, with the names that "
            "image-net.org/download-images gives them."
        )
    return path


def _members(path):
    """(open tar, member) for every member of a tar, which must go on to its regular end."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                yield tar, member
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(PADDING)
    except tarfile.ReadError as error:
        cut_off = "unexpected end" in str(error)
        not_tar = f"{path} is not a tar file ({error}): download or copy it again."
        raise UserError(_cut_off(path) if cut_off else not_tar) from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the file.") from error
    if len(rest) < tarfile.BLOCKSIZE or len(rest) == PADDING or any(rest):
        raise UserError(_cut_off(path))


def _cut_off(path):
    return (
        f"{path} is cut off or damaged ({path.stat().st_size:,} bytes that do not end as a tar does): "
        "download or copy it again."
    )


def _class_of(path, tar, member, known):
    """The class whose tar a member is, after a look at the first file in it."""
    name = posixpath.normpath(member.name)
    if not re.fullmatch(r"n\d{8}\.tar", name):
        raise UserError(
            f"{path} holds {member.name!r} where the tar of a class such as 'n01440764.tar' is expected: "
            "it is not the tar of the training images as image-net.org gives it."
        )
    wnid = name.removesuffix(".tar")
    if wnid in known:
        raise UserError(f"{path} holds {name} twice: it is not the tar that image-net.org gives.")
    try:
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as images:
            first = images.next()
    except tarfile.ReadError as error:
        raise UserError(
            f"{name} in {path} is cut off or damaged ({error}): download or copy it again."
        ) from error
    found = first.name if first else "nothing"
    if not re.fullmatch(rf"{wnid}_\d+\.JPEG", posixpath.normpath(found)):
        raise UserError(
            f"{name} in {path} begins with {found!r} where an image such as '{wnid}_18.JPEG' is expected."
        )
    return wnid


def _check_validation(path, names):
    """Names must be those of the first n images: TFDS gives labels in the order of names."""
    if not names:
        raise UserError(f"{path} holds no image: it is not the tar of the validation images.")
    if len(names) > PUBLISHED["validation"].images:
        raise UserError(
            f"{path} holds {len(names):,} images, more than the validation images that TFDS knows."
        )
    for number, name in enumerate(names, 1):
        expected = f"ILSVRC2012_val_{number:08d}.JPEG"
        if name == expected:
            continue
        if re.fullmatch(r"ILSVRC2012_val_\d{8}\.JPEG", name):
            raise UserError(
                f"{path} holds {name} but not {expected} before it: TFDS gives labels in the order of names, "
                "so that all labels after a gap would be wrong."
            )
        raise UserError(
            f"{path} holds {name!r} where an image such as {expected!r} is expected: it is not the tar "
            "of the validation images as image-net.org gives it."
        )
