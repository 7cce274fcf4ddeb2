"""ImageNet as a TFDS directory: python -m convit_jax.data.prepare --tars=DIR --output=DIR.

TFDS's own builder makes OUTPUT/imagenet2012/5.1.0 of the two ILSVRC tars. It needs TensorFlow, which nothing
else here does. It works in OUTPUT/.imagenet2012-unfinished, and the result is renamed when it has been
checked: what stands under its name is whole, and what a killed run left is removed by the next one.
"""

import argparse
import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import logging
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from convit_jax.data import open_files
from convit_jax.data.ilsvrc import PUBLISHED, look_through, partial
from convit_jax.data.tfds_progress import Progress
from convit_jax.errors import UserError

NAME = "imagenet2012"
FORMATS = ("array_record", "tfrecord")
OPEN_FILES = 1_200  # TFDS sorts into 1,000 files at once
REQUIRED = {  # module: package
    "tensorflow": "tensorflow-cpu",
    "tensorflow_datasets": "tensorflow-datasets",
    "importlib_resources": "importlib_resources",  # TFDS forgets to ask for it
    "PIL": "pillow",
}


def main():
    """The command; ends with status 0, or with one sentence and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m convit_jax.data.prepare",
        description="Make the TFDS directory of ImageNet from the two ILSVRC tars.",
        allow_abbrev=False,
    )
    parser.error = fail
    tars = " and ".join(published.tar for published in PUBLISHED.values())
    made = f"TFDS data directory; DIR/{NAME}/VERSION is made there"
    parser.add_argument("--tars", metavar="DIR", type=Path, required=True, help=f"folder with {tars}")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=made)
    parser.add_argument("--format", choices=FORMATS, help=f"of the record files (default: {FORMATS[0]})")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        prepare(args.tars.expanduser(), args.output.expanduser(), args.format)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("prepare: interrupted; what was written has been removed.", file=sys.stderr)
        sys.exit(130)


def fail(sentence):
    """End with a sentence for the user."""
    sys.exit(f"prepare: {sentence}")


def prepare(tars, output, file_format=None):
    """Make OUTPUT/imagenet2012/VERSION of the tars, unless it is there; file_format: one of FORMATS or None.

    Raises:
      UserError: whatever keeps the result from being whole; then nothing is left under its name.
    """
    there = already_there(output, file_format)
    if there:
        print(f"{there} Nothing to do.")
        return
    require_packages()
    since = time.monotonic()
    print(f"Looking through the tars in {tars}")
    contents = look_through(tars)
    print(f"  classes {len(contents.classes):,}, validation images {contents.validation_images:,}")
    for sentence in partial(contents):
        print(f"  {sentence}")
    open_files.allow(OPEN_FILES, "TFDS")
    with workspace(output, space_needed(sum(contents.bytes.values()))) as work:
        file_format = file_format or FORMATS[0]
        directory = build(work, contents, file_format)
        print("Checking what was written")
        try:
            counts = check(directory, contents, file_format)
        except UserError:
            raise
        except Exception as error:  # of TFDS, TensorFlow, the disk
            raise UserError(f"what TFDS wrote cannot be read back ({brief(error)}).") from error
        os.sync()  # the files before the name that says that they are whole
        target = output / NAME / directory.name
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)
    print(f"Done in {timedelta(seconds=round(time.monotonic() - since))}: {target}")
    for split, count in counts.items():
        print(f"  {split:<10} {count:>9,} images, {share(count, contents.bytes[split], PUBLISHED[split])}")
    print(f"  next       python train.py --config=configs/convit_s.py --config.data.dir={output}")


def share(count, tar_bytes, published):
    """What so many images are of ImageNet's."""
    if count == published.images:
        return "all of ImageNet's"
    if tar_bytes == published.bytes:
        return (
            f"not ImageNet's {published.images:,}, though {published.tar} has the published size: it is "
            "damaged, compare its checksum with the published one"
        )
    return f"a part of ImageNet's {published.images:,}"


def already_there(output, file_format):
    """A sentence on the data set that OUTPUT holds, or None.

    Raises:
      UserError: it lacks a split or a file, or has not the format that was asked for.
    """
    for directory in sorted(output.glob(f"{NAME}/[0-9]*")):
        remedy = "move it away or remove it, and start again."
        try:
            facts = json.loads((directory / "dataset_info.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{directory} has no readable dataset_info.json: {remedy}") from error
        shards = {split["name"]: split["shardLengths"] for split in facts["splits"]}
        for split in PUBLISHED:
            if split not in shards:
                why = "TFDS makes such a directory when a tar is missing"
                raise UserError(f"{directory} has no {split} split ({why}): {remedy}")
            expected, found = len(shards[split]), len(list(directory.glob(f"{NAME}-{split}.*-of-*")))
            if found < expected:
                raise UserError(f"{directory} has {found:,} of the {expected:,} files of {split}: {remedy}")
        images = " and ".join(f"{split} {sum(map(int, shards[split])):,}" for split in PUBLISHED)
        is_format = facts.get("fileFormat", "tfrecord")
        if file_format not in (None, is_format):
            raise UserError(
                f"{directory} is there already, as {is_format}: for {file_format} give another --output "
                "(training reads both)."
            )
        return f"{directory} is there already, as {is_format}, with {images} images."
    return None


def require_packages():
    """Raise UserError if what only this command needs is not installed."""
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, needed for this "
            'step only: pip install ".[prepare]" (or, in an environment of its own, '
            "pip install -r requirements-prepare.txt)."
        )


def space_needed(tar_bytes):
    """Bytes on disk at the peak: the images once, and what ArrayRecord pads its files by.

    TFDS's files for shuffling hold a split's images once more, but each is removed as it is read.
    """
    return tar_bytes + tar_bytes // 50 + (2 << 20)


@contextlib.contextmanager
def workspace(output, needed):
    """A folder in OUTPUT for this process alone, with room for `needed` bytes; removed at the end."""
    work = output / f".{NAME}-unfinished"
    with contextlib.ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((work / "lock").open("w"))
            with contextlib.suppress(OSError):  # a file system without locks
                hold(lock, output)
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            left = [entry for entry in work.iterdir() if entry.name != "lock"]
            if left:
                print(f"Removing what an interrupted preparation left in {work}")
            for entry in left:
                shutil.rmtree(entry)
            free = shutil.disk_usage(work).free
        except OSError as error:
            raise UserError(
                f"cannot write into {output} ({error.strerror}): give a folder of yours as --output."
            ) from error
        if free < needed:
            raise UserError(
                f"{output} has {free / 1e9:,.2f} GB free, {needed / 1e9:,.2f} GB are needed (with TFDS's "
                "files for shuffling): make room, or give another --output."
            )
        yield work


def hold(lock, output):
    """Lock an open file, or raise UserError if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process prepares {NAME} in {output}: wait until it ends.") from error


def build(work, contents, file_format):
    """Let TFDS's builder make the data set in a folder: its directory.

    Raises:
      UserError: with the place where TFDS stopped.
    """
    tfds = quiet_tfds()
    tars = work / "tars"
    tars.mkdir()
    for path in contents.paths.values():  # no test tar, which would become 100,000 images without labels
        (tars / path.name).symlink_to(path.resolve())
    builder = tfds.builder(NAME, data_dir=work)
    unknown = {*contents.classes} - {*builder.info.features["label"].names}
    if unknown:
        raise UserError(f"{contents.paths['train']} has {min(unknown)}.tar, no class of ImageNet's 1,000.")
    progress = Progress(contents.classes, contents.validation_images)
    tfds.core.utils.tqdm = progress.watch
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                file_format=file_format,
                download_config=tfds.download.DownloadConfig(manual_dir=tars, try_download_gcs=False),
            )
    except Exception as error:  # of TFDS, TensorFlow, tarfile, the disk
        raise UserError(stopped(error, progress, work.parent)) from error
    finally:
        progress.close()
    return Path(builder.data_path)


def quiet_tfds():
    """tensorflow_datasets, with TensorFlow kept from the GPU and from talking."""
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)
    return tfds


def stopped(error, progress, output):
    """What stopped TFDS and where, in one sentence."""
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return f"the disk of {output} is full ({progress.place()}): make room and start again."
    return f"TFDS stopped {progress.place()} ({brief(error)})."


def brief(error):
    """A foreign error in one line, which TFDS begins with whole examples: its end."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def check(directory, contents, file_format):
    """{split: number of images} of what TFDS made, after counting, weighing and reading some of it.

    Raises:
      UserError: something is not as it should be.
    """
    tfds = quiet_tfds()
    builder = tfds.builder_from_directory(directory)
    counts = {}
    for split in PUBLISHED:
        if split not in builder.info.splits:
            raise UserError(f"TFDS made no {split} split.")
        info = builder.info.splits[split]
        check_files(info, file_format)
        counts[split] = info.num_examples
        for index in sorted({0, counts[split] // 2, counts[split] - 1}):
            check_record(tfds, builder, file_format, split, index)
    if counts["validation"] != contents.validation_images:
        raise UserError(
            f"TFDS took {counts['validation']:,} of {contents.validation_images:,} validation images."
        )
    return counts


def check_files(split, file_format):
    """The files of a split hold as many records, or bytes, as TFDS gave to their writer."""
    paths = [Path(path) for path in split.filepaths]
    if file_format == "array_record":
        from array_record.python.array_record_module import ArrayRecordReader

        for path, expected in zip(paths, split.shard_lengths, strict=True):
            reader = ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
            if found != expected:
                raise UserError(f"{path.name} holds {found:,} of {expected:,} images.")
    else:
        expected = split.num_bytes + 16 * split.num_examples  # length and two checksums a record
        found = sum(path.stat().st_size for path in paths)
        if found != expected:
            raise UserError(f"the files of {split.name} have {found:,} bytes, not {expected:,}.")


def check_record(tfds, builder, file_format, split, index):
    """Read a record back: the image must decode, its label be that of its name."""
    from PIL import Image

    decoders = {"image": tfds.decode.SkipDecoding()}
    if file_format == "array_record":
        record = builder.as_data_source(split, decoders=decoders)[index]
    else:
        one = tfds.core.ReadInstruction(split, from_=index, to=index + 1, unit="abs")
        record = next(iter(tfds.as_numpy(builder.as_dataset(split=one, decoders=decoders))))
    name = record["file_name"].decode()
    wnid = builder.info.features["label"].int2str(int(record["label"]))
    if split == "train" and not name.startswith(f"{wnid}_"):
        raise UserError(f"TFDS gave {name} the label of {wnid}.")
    try:
        Image.open(io.BytesIO(record["image"])).load()
    except OSError as error:
        raise UserError(f"the image {name} does not decode ({error}): look at it in the tar.") from error


if __name__ == "__main__":
    main()
