"""Tars in memory, and the two of ImageNet (ILSVRC 2012) in miniature."""

import io
import tarfile


def archive(files):
    """Returns a tar of {name: bytes}."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return target.getvalue()


def write_ilsvrc(folder, train, validation):
    """Writes ILSVRC2012_img_train.tar, a tar of tars, and ILSVRC2012_img_val.tar of {file name: bytes}."""
    classes = {}
    for name in sorted(train):
        classes.setdefault(name.split("_")[0], {})[name] = train[name]
    tars = {f"{wnid}.tar": archive(images) for wnid, images in classes.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(archive(tars))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(archive(dict(sorted(validation.items()))))
