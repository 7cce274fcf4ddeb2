"""The resized position embedding equals PyTorch's bicubic interpolation."""

import json

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN

from convit_jax.weights.positions import bicubic_matrix, resize_pos_embed

CASES = json.loads((GOLDEN / "pos_embed_resize.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['old']}-{case['new']}")
def test_as_pytorch_does_it(case):
    given, expected = (np.array([case[name]], np.float32) for name in ("pos_embed", "resized"))
    resized = resize_pos_embed(given, case["old"], case["new"])
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-5)
    extra = given.shape[1] - case["old"][0] * case["old"][1]
    np.testing.assert_array_equal(resized[:, :extra], given[:, :extra])  # class and distillation token


def test_the_same_grid_changes_nothing_and_the_dtype_of_the_file_is_kept():
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5))
    assert resize_pos_embed(np.ones((1, 5, 2), ml_dtypes.bfloat16), (2, 2), (3, 4)).dtype == ml_dtypes.bfloat16
