"""Says which part of a value is wrong, if not all of it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.divergence import find_wrong, wrong_elements
from vit_ref.verify.diagnose.predictions import IMAGE


def find_place(value: NDArray, truth: NDArray) -> str:
    """Returns where a value is wrong, to be read after the word "wrong"; "" if each index of each axis has errors.

    Args:
      value: the wrong value.
      truth: the right value.
    """
    places = [
        f"{_ranges(indices)} of {size} along axis {axis}"
        for axis, (indices, size) in enumerate(zip(find_wrong(value, truth), truth.shape, strict=True))
        if len(indices) < size
    ]
    if places:
        return f"only at {'; '.join(places)}"
    return _border(value, truth)


def _ranges(indices: NDArray) -> str:
    """Returns indices as text, those that follow each other as a range."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    said = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ", ".join(said[:3]) + (", ..." if len(said) > 3 else "")


def _border(value: NDArray, truth: NDArray) -> str:
    """Returns how wide the border of an image of PyTorch's is in which all errors lie; "" if it is most of it."""
    if truth.ndim != IMAGE:
        return ""
    wrong = wrong_elements(value, truth).any(axis=(0, 1))
    rows, columns = wrong.shape
    row, column = np.ogrid[:rows, :columns]
    depth = np.minimum(np.minimum(row, rows - 1 - row), np.minimum(column, columns - 1 - column))
    width = int(depth[wrong].max()) + 1
    return f"only within {width} of the border" if width <= min(rows, columns) // 4 else ""
