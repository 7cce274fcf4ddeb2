"""Prepares ImageNet for training: makes a TFDS directory from the two ILSVRC tars.

    python -m convit_jax.data.prepare --tars=DIR --output=DIR

Needs TensorFlow, which nothing else here uses: pip install -r requirements-prepare.txt.

TFDS does the work, but does not notice incomplete tars: it skips a missing tar, takes a truncated one as it
is, and gives wrong labels after a gap in the validation images. So the tars are checked first and the number
of images last.
"""

import argparse
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

from convit_jax.data.class_names import IMAGENET_IMAGES
from convit_jax.errors import UserError

NAME = "imagenet2012"
TARS = {  # name and size in bytes, as published on image-net.org
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}


def _prepare(tars: Path, output: Path, file_format: str, allow_incomplete: bool) -> Path:
    """Makes OUTPUT/imagenet2012/VERSION, which exists only if it is complete, and returns it."""
    if existing := next(output.glob(f"{NAME}/[0-9]*"), None):
        raise UserError(f"{existing} exists already: remove it, or give another --output.")
    needed = _check_tars(tars, allow_incomplete) * 51 // 50  # ArrayRecord pads its files
    work = output / f".{NAME}-unfinished"
    try:
        work.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"{work} exists: another preparation is running, or was killed. If none is running, remove it."
        ) from error
    try:
        if (free := shutil.disk_usage(work).free) < needed:
            raise UserError(
                f"{output} has {free / 1e9:,.2f} GB free but {needed / 1e9:,.2f} GB are needed: make room, "
                "or give another --output."
            )
        built = _build(tars, work, file_format, allow_incomplete)
        target = output / NAME / built.name
        target.parent.mkdir(exist_ok=True)
        os.sync()  # the files, before the name that says that they are complete
        return built.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_tars(folder: Path, allow_incomplete: bool) -> int:
    """Returns the size of the tars in bytes."""
    total = 0
    for name, published in TARS.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: put {' and '.join(TARS)} there.")
        size = (folder / name).stat().st_size
        if size != published and not allow_incomplete:
            raise UserError(
                f"{folder / name} has {size:,} bytes instead of {published:,}: download it again, or add "
                "--allow_incomplete if it is meant to be a part of ImageNet."
            )
        total += size
    try:
        with tarfile.open(folder / name, "r:") as validation:
            found = sorted(validation.getnames())
    except tarfile.TarError as error:
        raise UserError(f"{folder / name} is damaged ({error}): download it again.") from error
    if not found or found != [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(found) + 1)]:
        raise UserError(
            f"{folder / name} must hold ILSVRC2012_val_00000001.JPEG and so on without a gap, because TFDS "
            "labels the images in order: download it again."
        )
    return total


def _build(tars: Path, work: Path, file_format: str, allow_incomplete: bool) -> Path:
    """Runs TFDS's builder in a folder, counts the images, and returns the data set's directory."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(NAME, data_dir=work)
        builder.download_and_prepare(
            file_format=file_format,
            download_config=tfds.download.DownloadConfig(manual_dir=tars, try_download_gcs=False),
        )
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-prepare.txt.") from error
    except Exception as error:  # of TFDS, TensorFlow, ArrayRecord or the disk
        reason = " ".join(str(error).split())[-300:]  # TFDS puts whole examples first
        raise UserError(f"TFDS failed ({type(error).__name__}: {reason}).") from error
    for split, expected in IMAGENET_IMAGES.items():
        count = builder.info.splits[split].num_examples
        print(f"{split}: {count:,} of ImageNet's {expected:,} images")
        if count != expected and not allow_incomplete:
            raise UserError(
                f"the tars hold {count:,} {split} images instead of {expected:,}: compare their checksums "
                "with the published ones and download them again."
            )
    return Path(builder.data_dir)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m convit_jax.data.prepare",
        description="Make a TFDS directory of ImageNet from the two ILSVRC tars.",
        allow_abbrev=False,
    )
    parser.add_argument("--tars", metavar="DIR", type=Path, required=True, help="folder with both tars")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="TFDS's data directory")
    parser.add_argument("--format", choices=("array_record", "tfrecord"), default="array_record")
    parser.add_argument("--allow_incomplete", action="store_true", help="accept a part of ImageNet")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up, as after Ctrl-C
    output = args.output.expanduser()
    try:
        made = _prepare(args.tars.expanduser(), output, args.format, args.allow_incomplete)
    except (UserError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare: interrupted; the unfinished files are removed.", file=sys.stderr)
        return 130
    print(f"{made} is ready: python train.py --config=configs/convit_s.py --config.data.dir={output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
