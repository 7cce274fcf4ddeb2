"""Time and memory to index as many TFRecords as ImageNet has, and to load that index again.

    python -m benchmarks.index [--records=1281167] [--shards=1024] [--record_bytes=300]

Writes a TFDS directory of small records into a temporary folder (0.5 GB); 1,024 files may be open at first.
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from convit_jax.data.examples import Slots, TrainExample
from convit_jax.data.subsample import select
from convit_jax.data.tfds import TfdsImages
from convit_jax.data.tfrecord import CRC, HEADER, masked_crc

FIXTURE = Path(__file__).parents[1] / "tests/golden/tfds.tar.gz"


def write_directory(root, records, shards, record_bytes):
    """A directory like TFDS's imagenet2012, with `records` training examples of noise instead of photos."""
    from tensorflow_datasets.proto import tf_example_pb2

    with tarfile.open(FIXTURE) as archive:
        archive.extractall(root, filter="data")
    folder = root / "tfrecord/imagenet2012/5.1.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    lengths = [records // shards + (shard < records % shards) for shard in range(shards)]
    train = next(split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"] = [str(length) for length in lengths]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for path in folder.glob("imagenet2012-train*"):
        path.unlink()
    wnids = (folder / "label.labels.txt").read_text().split()
    rng, number = np.random.default_rng(0), 0
    for shard, length in enumerate(lengths):
        with open(folder / f"imagenet2012-train.tfrecord-{shard:05d}-of-{shards:05d}", "wb") as file:
            for _ in range(length):
                example = tf_example_pb2.Example()
                label = int(rng.integers(1000))
                example.features.feature["label"].int64_list.value.append(label)
                name = f"{wnids[label]}_{number}.JPEG".encode()
                example.features.feature["file_name"].bytes_list.value.append(name)
                example.features.feature["image"].bytes_list.value.append(bytes(record_bytes))
                payload = example.SerializeToString()
                size = struct.pack("<Q", len(payload))
                file.write(
                    HEADER.pack(len(payload), masked_crc(size)) + payload + CRC.pack(masked_crc(payload))
                )
                number += 1
    return root / "tfrecord"


def timed(what, function):
    """The result of a function; prints how long it took and the peak memory of this process so far."""
    began = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{seconds:8.2f} s  {peak:6.0f} MB peak  {what}", flush=True)
    return result


def measure(root):
    """Index, load, select and read, in a process that may open 1,024 files at first."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    timed("imports", lambda: __import__("tensorflow_datasets").__version__)
    timed("build the index", lambda: TfdsImages("imagenet2012", root, "train"))


def load(root):
    """What every later start does."""
    timed("imports", lambda: __import__("tensorflow_datasets").__version__)
    source = timed("load the index", lambda: TfdsImages("imagenet2012", root, "train"))
    timed("select all", lambda: select(source.labels, source.names))
    timed(
        "select the first tenth of each class",
        lambda: select(source.labels, source.names, sampling_ratio=0.1),
    )
    slots = Slots(np.arange(len(source)), 0, 3)
    example = TrainExample(source, slots, (224, 224), "resized")
    timed("the order of an epoch", lambda: example.slots.example(0))
    step = max(1, len(source) // 5000)
    timed("read 5,000 records of all shards", lambda: [source[i] for i in range(0, len(source), step)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_281_167)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--record_bytes", type=int, default=300)
    parser.add_argument("--child", choices=("measure", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        {"measure": measure, "load": load}[options.child](options.root)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = timed(
            f"write {options.records:,} records in {options.shards:,} shards",
            lambda: write_directory(Path(folder), options.records, options.shards, options.record_bytes),
        )
        for child in ("measure", "load"):
            command = [sys.executable, "-m", "benchmarks.index", f"--child={child}", f"--root={root}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
