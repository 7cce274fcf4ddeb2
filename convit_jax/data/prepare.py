"""Prepares ImageNet for training: makes a TFDS directory from the two ILSVRC tars.

    python -m convit_jax.data.prepare --tars=DIR --output=DIR

Needs TensorFlow, which nothing else here uses: pip install -r requirements-prepare.txt.

TFDS skips a missing tar, takes a truncated one as it is, and gives wrong labels after a gap in the validation
images. So the tars are checked first and the number of images last.
"""

import argparse
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

from convit_jax.data.class_names import IMAGENET_IMAGES
from convit_jax.errors import UserError

TARS = {  # name and size in bytes, as published on image-net.org
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}


def _check_tars(folder: Path, allow_incomplete: bool) -> None:
    for name, published in TARS.items():
        size = (folder / name).stat().st_size
        if size != published and not allow_incomplete:
            raise UserError(
                f"{folder / name} has {size:,} bytes instead of {published:,}: download it again, or add "
                "--allow_incomplete if it is meant to be a part of ImageNet."
            )
    try:
        with tarfile.open(folder / name, "r:") as validation:
            found = sorted(validation.getnames())
    except tarfile.TarError:
        found = []
    if not found or found != [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(found) + 1)]:
        raise UserError(
            f"{folder / name} must hold ILSVRC2012_val_00000001.JPEG and so on without a gap, because TFDS "
            "labels the images in order: download it again."
        )


def _build(tars: Path, output: Path, file_format: str, allow_incomplete: bool) -> str:
    """Returns the data set's directory; TFDS removes an unfinished one, and so does a wrong number of images."""
    if existing := next(output.glob("imagenet2012/[0-9]*"), None):
        raise UserError(f"{existing} exists already: remove it, or give another --output.")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder("imagenet2012", data_dir=output)
        with tempfile.TemporaryDirectory() as empty:  # TFDS makes folders for what it would download
            builder.download_and_prepare(
                file_format=file_format,
                download_dir=empty,
                download_config=tfds.download.DownloadConfig(manual_dir=tars, try_download_gcs=False),
            )
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-prepare.txt.") from error
    counts = {split: builder.info.splits[split].num_examples for split in IMAGENET_IMAGES}
    print(f"images: {counts}; ImageNet has {IMAGENET_IMAGES}")
    if counts != IMAGENET_IMAGES and not allow_incomplete:
        shutil.rmtree(builder.data_dir)
        raise UserError("the tars do not hold all of ImageNet: compare their checksums and download them again.")
    return builder.data_dir


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # Path.expanduser raises where there is no home directory


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser("python -m convit_jax.data.prepare", allow_abbrev=False)
    parser.add_argument("--tars", metavar="DIR", type=_path, required=True, help="folder with both tars")
    parser.add_argument("--output", metavar="DIR", type=_path, required=True, help="TFDS's data directory")
    parser.add_argument("--format", choices=("array_record", "tfrecord"), default="array_record")
    parser.add_argument("--allow_incomplete", action="store_true", help="accept a part of ImageNet")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up, as after Ctrl-C
    try:
        _check_tars(args.tars, args.allow_incomplete)
        made = _build(args.tars, args.output, args.format, args.allow_incomplete)
    except (UserError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare: interrupted.", file=sys.stderr)
        return 130
    print(f"{made} is ready: python train.py --config=configs/convit_s.py --config.data.dir={args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
