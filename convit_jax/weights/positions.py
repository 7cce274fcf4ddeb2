"""Resizes the learned position embedding for images of another size than those of the training.

Bicubic like PyTorch's F.interpolate(mode="bicubic", align_corners=False), which the authors' fine-tuning
uses: pixel i of `new` lies at (i + 1/2) old / new - 1/2, its four neighbours (clamped to the edge) have
weights k(t), Keys' cubic kernel with a = -3/4, and there is no antialiasing.
"""

import numpy as np


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Returns weights, float64 [new, old], that resize an axis of length `old` to length `new`."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        t = np.abs(centre - left - tap)
        near = ((a + 2) * t - (a + 3)) * t * t + 1  # t <= 1
        far = a * (((t - 5) * t + 8) * t - 4)  # 1 < t < 2
        np.add.at(matrix, (np.arange(new), np.clip(left + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix


def resize_pos_embed(pos_embed: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> np.ndarray:
    """Returns a position embedding [1, T + rows * columns, D] for another grid (rows, columns), in the same dtype.

    The first T entries, of class and distillation token, do not change.
    """
    rows, columns = old_grid
    extra = pos_embed.shape[1] - rows * columns
    patches = np.asarray(pos_embed[0, extra:], np.float64).reshape(rows, columns, -1)
    y, x = bicubic_matrix(rows, new_grid[0]), bicubic_matrix(columns, new_grid[1])
    resized = np.einsum("yv,xu,vud->yxd", y, x, patches, optimize=True).reshape(1, -1, patches.shape[-1])
    return np.concatenate([pos_embed[:, :extra], resized.astype(pos_embed.dtype)], axis=1)
