"""Predicts a wrong value from the right one, at any site: a factor, a shift, a lower precision, another order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.gates import error
from vit_ref.verify.rounding import STORED, UNIT

# Two right values in float64 differ by less than this, relative to their size, and two formulas by more.
SAME = 1e-10
# An image has so many axes, with its batch and its channels.
IMAGE = 4
# At least so many rows are needed to find a factor for each channel.
_ROWS = 6


class Prediction(NamedTuple):
    """The value that a bug would produce, to be compared with the candidate's.

    Attributes:
      label: what the candidate does instead of the right thing.
      value: the value at the diverging site.
      format: the format that the value was rounded to, if that is the bug; else "".
    """

    label: str
    value: NDArray
    format: str = ""


# How many units of rounding an error may be if the site's own sums are in that format, too.
_UNITS = 16


def explain_by_value(truth: NDArray, value: NDArray, part: tuple[NDArray, ...]) -> Iterator[Prediction]:
    """Yields a factor, shifts along an axis, and lower precisions.

    Args:
      truth: the right value.
      value: the candidate's value.
      part: indices of the wrong elements.
    """
    if not value[part].any():
        yield Prediction("all zero", np.zeros_like(truth))
        return
    # Any one element is some factor of any other, so one element proves nothing.
    if truth[part].any() and value[part].size > 1:
        factor = slope(truth[part], value[part])
        if (digits := f"{factor:.6g}") != "1":
            yield Prediction(f"{digits} x the reference", factor * truth)
    for shift in (1, -1):
        for axis, name in zip(range(truth.ndim), ("images", "tokens"), strict=False):
            yield Prediction(f"{name} shifted by {shift}", np.roll(truth, shift, axis))
    for name, rounded in STORED.items():
        if np.array_equal(rounded(value), value):
            # Rounding explains an error of its own size. It does not explain a larger error.
            if error(value, truth).rms <= _UNITS * UNIT[name]:
                yield Prediction(f"rounded to {name}", value, format=name)
            return


def slope(x: NDArray, y: NDArray) -> float:
    """Returns the factor that brings x closest to y, 0 if x is all zero."""
    square = np.vdot(x, x)
    return float(np.vdot(x, y) / square) if square else 0.0


# Distances between all pairs along an axis of tens of thousands of classes would take gigabytes.
_LONGEST = 8192


def explain_by_order(truth: NDArray, value: NDArray, axes: tuple[str, ...]) -> Iterator[Prediction]:
    """Yields other orders along one axis: of heads, channels, classes, tokens or images.

    Args:
      truth: the right value.
      value: the candidate's value.
      axes: the name of one index along each axis.
    """
    for axis, (name, size) in enumerate(zip(axes, truth.shape, strict=True)):
        if size > _LONGEST:
            continue
        theirs, right = (np.moveaxis(each, axis, 0).reshape(size, -1) for each in (value, truth))
        # Squared distances between all pairs, less the part that is the same along a row.
        order = np.argmin(np.square(right).sum(axis=1) - 2 * theirs @ right.T, axis=1)
        if len(set(order)) == size and (order != np.arange(size)).any():
            first = ", ".join(map(str, order[:4])) + (", ..." if size > 4 else "")
            yield Prediction(f"another order along the {name} axis ({first})", np.take(truth, order, axis))


def channel_axes(value: NDArray) -> list[int]:
    """Returns the axes that may be the channels of a value: the last, and in an image of PyTorch's the second.

    Args:
      value: the value. Without enough other elements beside its channels it has none.
    """
    if not value.ndim or not value.size:
        return []
    axes = [-1, 1] if value.ndim >= IMAGE else [-1]
    return [axis for axis in axes if value.size // value.shape[axis] >= _ROWS]


def distance(one: NDArray, other: NDArray) -> float:
    """Returns how far one value is from another, relative to the other; infinity if that is not finite."""
    size = float(np.linalg.norm(other))
    return float(np.linalg.norm(one - other)) / size if size > 0 and bool(np.isfinite(one).all()) else math.inf


def is_same(one: NDArray, other: NDArray) -> bool:
    """Returns whether two values are equal but for the rounding of float64."""
    return distance(one, other) <= SAME
