"""Makes the checkpoints of this folder with PyTorch: python tests/golden/make_checkpoints.py

The tests read them without PyTorch and know what is in them: every tensor counts from 0 in its own type.
"""

import argparse
import pathlib
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("complex64", "complex128", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


def counted(dtype, *shape):
    """0, 1, 2, ... of a type, in a shape."""
    return torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, dtype))


def everything():
    """A training checkpoint with each thing that the reader knows."""
    base = torch.arange(24.0).reshape(4, 6)
    tied = counted("float32", 3)
    carrier = counted("float32", 2)
    carrier.note = "an attribute of a tensor"
    model = OrderedDict((f"module.{dtype}", counted(dtype, 2, 3)) for dtype in DTYPES)
    model._metadata = OrderedDict({"": {"version": 1}})
    return {
        "model": model,
        "views": {
            "whole": base,
            "transposed": base.T,
            "row": base[2],
            "steps": base[1::2, ::3],
            "expanded": torch.arange(2.0)[:, None].expand(2, 3),
            "scalar": torch.tensor(7.0),
            "empty": torch.zeros(0, 3),
            "channels_last": counted("float32", 1, 2, 3, 4).to(memory_format=torch.channels_last),
        },
        "tied": [tied, tied, tied[1:]],
        "parameter": torch.nn.Parameter(counted("float32", 2)),
        "carrier": carrier,
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "args": argparse.Namespace(lr=5e-4, output=pathlib.PurePosixPath("/runs/one"), resume="", world=None),
        "best": np.float64(71.5),
        "numpy": np.arange(6, dtype=np.int32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "nothing": np.zeros((0, 2), np.float32),
        "counter": Counter({30: 1, 60: 2}),
        "default": defaultdict(list, {"a": [1]}),
        "plain": [True, None, -1, 300, 70000, 2**40, -(2**70), 0.5, "grün", b"\x00\xff", (1, (2,)), {3}, 1j],
        "rng": counted("uint8", 16),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": counted("float32", 5)}}},
    }


def main():
    kinds = everything()
    torch.save(kinds, HERE / "kinds_zip.pth")
    torch.save(kinds, HERE / "kinds_zip_protocol_5.pth", pickle_protocol=5)
    torch.save(kinds, HERE / "kinds_stream.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
