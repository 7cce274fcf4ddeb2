"""safetensors headers that are false are refused before memory is taken."""

import json

import numpy as np
import pytest
from conftest import ROOT


def file(header, data=bytes(8), length=None):
    """A safetensors file; the header is a dict or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
FALSE = {
    "overlap": (file({"a": entry(), "b": entry(4, 12)}, bytes(12)), "data of 'b' overlaps the one before"),
    "the same bytes": (file({"a": entry(), "b": entry()}), "data of 'b' overlaps the one before"),
    "a gap": (file({"a": entry(), "b": entry(12, 20)}, bytes(20)), "data of 'b' leaves a gap before"),
    "beyond the file": (file({"a": entry(0, 4000, (1000,))}), "describes 4,000 bytes of data, .* has 8"),
    "terabytes": (file({"a": entry(0, 2**42, (2**40,))}), "describes 4,398,046,511,104 bytes"),
    "2**62": (file({"a": entry(0, 2**62, (2**60,))}), "no proper shape and data_offsets"),
    "left over": (file({"a": entry()}, bytes(9)), "describes 8 bytes of data, the file has 9"),
    "negative": (file({"a": entry(-8, 0)}), "no proper shape and data_offsets"),
    "backwards": (file({"a": entry(8, 0)}), r"'a' needs 8 bytes, its data_offsets are \[8, 0\]"),
    "negative shape": (file({"a": entry(shape=(-1, -2))}), "no proper shape"),
    "wrong shape": (file({"a": entry(shape=(3,))}), "'a' needs 12 bytes"),
    "wrong type": (file({"a": entry(dtype="F64")}), "'a' needs 16 bytes"),
    "unknown type": (file({"a": entry(dtype="F4")}), "element type 'F4', which is not known"),
    "type of a list": (file({"a": entry(dtype=["F32"])}), "element type a list, which"),
    "fractions": (file({"a": entry(0.0, 8.0)}), "no proper shape"),
    "truths": (file({"a": entry(False, 4, (True,))}, bytes(4)), "no proper shape"),
    "three offsets": (file({"a": {**entry(), "data_offsets": [0, 8, 8]}}), "no proper shape"),
    "no offsets": (file({"a": {"dtype": "F32", "shape": [2]}}), "no proper shape"),
    "65 dimensions": (file({"a": entry(0, 4, (1,) * 65)}, bytes(4)), "no proper shape"),
    "empty and endless": (file({"a": entry(0, 0, (0, 2**61, 2**61))}, b""), "no proper shape"),
    "no entry": (file({"a": [1, 2]}), "no proper shape"),
    "twice": (file(TWICE), "its header has 'a' twice"),
    "a header too long": (file({"a": entry()}, length=10**6), "declares 1,000,000 bytes, the file has"),
    "a header of 2**63": (file({"a": entry()}, length=2**63), "declares 9,223,372,036,854,775,808 bytes"),
    "a header too large": (file(b"{" + b" " * 10**7 + b"}"), "more than the 10,000,000"),
    "a header too short": (file({"a": entry()}, length=12), "its header is not JSON"),
    "deep": (file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "its header is not JSON"),
    "a long number": (file(b'{"a":' + b"9" * 10_000 + b"}"), "its header is not JSON"),
    "not UTF-8": (file(b'{"\xff":1}'), "its header is not JSON"),
    "unprintable": (file({"\ud800\n": entry(dtype="?")}), r"'\\ud800\\n' has the element"),
    "booleans of 2": (file({"a": entry(0, 2, dtype="BOOL")}, b"\0\2"), "of booleans holds bytes other"),
}  # fmt: skip


@pytest.mark.parametrize("case", FALSE)
def test_headers_that_lie(refused, case):
    refused(*FALSE[case], "weights.safetensors")


def test_the_file_that_the_others_are_made_of(read_state_dict, tmp_path):
    numbers = np.arange(4, dtype=np.float32)
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 16),
        "a": entry(),
        "none": entry(16, 16, (0, 3)),
    }
    (tmp_path / "fine").write_bytes(file(header, numbers.tobytes()))  # told by its content, not its name
    tensors = read_state_dict(tmp_path / "fine")
    assert list(tensors) == ["b", "a", "none"]
    np.testing.assert_array_equal(tensors["a"], numbers[:2])
    np.testing.assert_array_equal(tensors["b"], numbers[2:])
    assert tensors["none"].shape == (0, 3)


def test_more_than_the_file(refused):
    data = (ROOT / "tests/golden/convit_golden.safetensors").read_bytes()
    refused(data + b"\0", "describes 232,984 bytes of data, the file has 232,985", "weights.safetensors")
