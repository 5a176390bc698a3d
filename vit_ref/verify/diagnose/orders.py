"""Predicts values and weights whose elements are in another order."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.predictions import Prediction

# So many heads are tried at most.
_HEADS = 32


def reorder_elements(truth: NDArray) -> Iterator[Prediction]:
    """Yields a value with its elements in the orders that an author mistakes for the right one.

    Args:
      truth: the right value.
    """
    if not truth.ndim or not truth.size:
        return
    for size in _parts(truth.shape[-1]):
        heads = truth.reshape(*truth.shape[:-1], -1, size)
        label = "" if size == truth.shape[-1] else f" of every {size} channels"
        yield Prediction(f"the two halves{label} swapped", np.roll(heads, size // 2, axis=-1).reshape(truth.shape))
        yield Prediction(f"the channels{label} in halves, for interleaved ones", interleave(truth, size))
        yield Prediction(f"the channels{label} interleaved, for halves", interleave(truth, size, back=True))
    for axis in range(truth.ndim):
        yield Prediction(f"reversed along axis {axis}", np.flip(truth, axis))
    for first in range(1, truth.ndim):
        for second in range(first + 1, truth.ndim):
            if truth.shape[first] == truth.shape[second]:
                yield Prediction(f"axes {first} and {second} exchanged", np.swapaxes(truth, first, second))
    yield from _reshaped(truth)


def _reshaped(truth: NDArray) -> Iterator[Prediction]:
    """Yields a value whose heads were split from its channels, or merged with them, by a reshape alone."""
    if truth.ndim == 4:
        merged = np.swapaxes(truth, 1, 2)
        label = "reshaped to (batch, heads, tokens, channels) without exchanging heads and tokens"
        yield Prediction(label, merged.reshape(truth.shape))
    if truth.ndim == 3:
        batch, tokens, width = truth.shape
        for heads in range(2, min(width, _HEADS + 1)):
            if width % heads == 0:
                split = truth.reshape(batch, tokens, heads, width // heads)
                label = f"{heads} heads merged by a reshape alone, without exchanging heads and tokens"
                yield Prediction(label, np.swapaxes(split, 1, 2).reshape(truth.shape))


def reorder_weight(weight: NDArray, parts: Collection[int] = ()) -> Iterator[Prediction]:
    """Yields a weight with its elements in the orders that an author mistakes for the right one.

    Args:
      weight: a matrix, or a kernel of a convolution with its spatial axes last.
      parts: the numbers of channels that may have been concatenated before the layer.
    """
    spatial = tuple(range(2, weight.ndim))
    if weight.ndim >= 2 and weight.shape[0] == weight.shape[1]:
        yield Prediction("transposed", np.swapaxes(weight, 0, 1))
    if any(weight.shape[axis] > 1 for axis in spatial):
        yield Prediction("flipped", np.flip(weight, spatial))
    if len(spatial) == 2 and weight.shape[2] == weight.shape[3] > 1:
        yield Prediction("with its two spatial axes exchanged", np.swapaxes(weight, 2, 3))
    for part in sorted(part for part in parts if weight.ndim >= 2 and part < weight.shape[1]):
        label = "applied to inputs whose {}, as if concatenated in another order"
        yield Prediction(label.format(f"first {part} channels stand last"), np.roll(weight, part, axis=1))
        if weight.shape[1] - part not in parts:
            yield Prediction(label.format(f"last {part} channels stand first"), np.roll(weight, -part, axis=1))


def interleave(x: NDArray, size: int, *, back: bool = False) -> NDArray:
    """Moves the first of each pair of channels into the first half of every `size` channels, or back.

    Args:
      x: the value.
      size: the number of channels that are moved together.
      back: whether to make pairs (0, 1), (2, 3), ... from the halves instead.
    """
    heads = x.reshape(*x.shape[:-1], -1, size)
    split = (2, size // 2) if back else (size // 2, 2)
    return np.swapaxes(heads.reshape(*heads.shape[:-1], *split), -1, -2).reshape(x.shape)


def _parts(width: int) -> list[int]:
    """Returns even sizes into which a width can be divided, the whole width first."""
    return [
        size
        for size in (width, *(width // heads for heads in range(2, 33) if width % heads == 0))
        if size % 2 == 0 and size > 2
    ][:6]
