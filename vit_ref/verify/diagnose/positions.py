"""Predicts tokens with learned positions that were resized to another grid in another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.predictions import IMAGE, Prediction, is_same


def _cubic(x: NDArray, a: float) -> NDArray:
    """Returns Keys' kernel of bicubic interpolation."""
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# Kernels at a distance of 0 or more. PyTorch has -0.75 unless it antialiases; the others have -0.5.
_KERNELS: dict[str, Callable[[NDArray], NDArray]] = {
    "bicubic (-0.75)": lambda x: _cubic(x, -0.75),
    "bicubic (-0.5)": lambda x: _cubic(x, -0.5),
    "bilinear": lambda x: np.maximum(1 - x, 0),
}
_MAPPINGS = ("to the size", "by a factor from the size + 0.1", "with aligned corners")


class Way(NamedTuple):
    """A way to resize. `str()` describes it.

    Attributes:
      kernel: see `_KERNELS`.
      antialiased: whether the kernel is widened when the grid shrinks.
      clamped: whether the border is repeated beyond the grid; if not, the kernel is cut off there.
      mapping: see `_MAPPINGS`.
    """

    kernel: str
    antialiased: bool
    clamped: bool
    mapping: str

    def __str__(self) -> str:
        words = [self.kernel, "antialiased" if self.antialiased else "not antialiased"]
        return ", ".join([*words, "border repeated" if self.clamped else "border cut off", self.mapping])

    def matrix(self, have: int, want: int) -> NDArray:
        """Returns the matrix (want, have) that resizes one axis."""
        factor = (want + 0.1) / have if self.mapping == _MAPPINGS[1] else want / have
        places = (np.arange(want) + 0.5) / factor - 0.5
        if self.mapping == _MAPPINGS[2]:
            places = np.arange(want) * (have - 1) / max(want - 1, 1)
        width = max(1.0, 1 / factor) if self.antialiased else 1.0
        beyond = math.ceil(2 * width) + 1
        indices = np.arange(-beyond, have + beyond) if self.clamped else np.arange(have)
        weights = _KERNELS[self.kernel](np.abs(places[:, None] - indices) / width)
        weights = weights / weights.sum(axis=1, keepdims=True)
        matrix = np.zeros((want, have))
        np.add.at(matrix.T, np.clip(indices, 0, have - 1), weights.T)
        return matrix


_WAYS = [Way(*each) for each in itertools.product(_KERNELS, (False, True), (True, False), _MAPPINGS)]


def resize_otherwise(
    truth: NDArray, before: Mapping[str, NDArray], parameters: Mapping[str, NDArray]
) -> Iterator[Prediction]:
    """Yields tokens with positions resized in other ways, if the right value is patches with resized positions.

    Args:
      truth: the right value: tokens (batch, tokens, channels), the patches last.
      before: the values before it. One of them holds the patches as an image of PyTorch's.
      parameters: the reference's parameters. One of them holds a square grid of positions, after those of the tokens
        before the patches.
    """
    if truth.ndim != 3:
        return
    for patches in before.values():
        if patches.ndim != IMAGE or patches.shape[:2] != (len(truth), truth.shape[-1]):
            continue
        grid = patches.shape[2:]
        start = truth.shape[1] - math.prod(grid)
        if start < 0:
            continue
        plain = patches.reshape(*patches.shape[:2], -1).swapaxes(1, 2)
        added = truth[:, start:] - plain
        if not is_same(np.broadcast_to(added.mean(axis=0), added.shape), added):
            continue
        for label, positions in _ways(added[0], grid, start, parameters):
            yield Prediction(label, np.concatenate([truth[:, :start], plain + positions], axis=1))


def _ways(
    added: NDArray, grid: tuple[int, ...], start: int, parameters: Mapping[str, NDArray]
) -> Iterator[tuple[str, NDArray]]:
    """Yields positions of the patches that were resized in other ways than the right ones."""
    for name, parameter in parameters.items():
        if parameter.ndim < 2 or parameter.shape[-1] != added.shape[-1]:
            continue
        rows = parameter.reshape(-1, added.shape[-1])
        for lead in {0, 1, start}:
            side = math.isqrt(max(len(rows) - lead, 0))
            if side < 2 or side**2 != len(rows) - lead or (side, side) == grid:
                continue
            square = rows[lead:].reshape(side, side, -1)
            # One channel tells the positions from a kernel that happens to have a square number of rows.
            one = square[..., :1]
            if "pos" not in name and not any(is_same(_resized(one, way, grid), added[:, :1]) for way in _WAYS):
                continue
            # Some ways are the same, as both kinds of border for bilinear interpolation.
            made: dict[str, tuple[Way, NDArray]] = {}
            for way in _WAYS:
                value = _resized(square, way, grid)
                made.setdefault(f"{np.linalg.norm(value):.9e}", (way, value))
            fits = [is_same(value, added) for _, value in made.values()]
            right = next((way for (way, _), fit in zip(made.values(), fits, strict=True) if fit), None)
            for (way, value), fit in zip(made.values(), fits, strict=True):
                if not fit:
                    yield f"{name} resized {way}" + (f"; right is {right}" if right else ""), value
            if right:
                turned = _resized(square.swapaxes(0, 1), right, grid)
                yield f"{name} with rows and columns exchanged before it is resized", turned


def _resized(square: NDArray, way: Way, grid: tuple[int, ...]) -> NDArray:
    """Returns a grid (side, side, channels) resized to another one, as tokens (patches, channels)."""
    rows, columns = (way.matrix(len(square), size) for size in grid)
    return np.einsum("ri,cj,ijd->rcd", rows, columns, square, optimize=True).reshape(-1, square.shape[-1])
