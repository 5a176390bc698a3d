"""Explanations that are read off a wrong value itself, whatever the site is: a factor, a precision, an order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.formats import STORED, UNIT
from vit_ref.verify.gates import error


class Prediction(NamedTuple):
    """What a bug would have made, to be compared with what a candidate shows.

    Attributes:
      label: what was done, or taken, instead.
      value: the value at the diverging site.
      format: the format that the value was rounded to, where that is the bug; else "".
    """

    label: str
    value: NDArray
    format: str = ""


# Of how many units an error may be where the site's own sums are in that format, too.
_UNITS = 16


def explain_by_value(truth: NDArray, value: NDArray, part: tuple[NDArray, ...]) -> Iterator[Prediction]:
    """A factor, a shift along an axis, a precision.

    Args:
      truth: the right value.
      value: the candidate's.
      part: indices of what is wrong.
    """
    if not value[part].any():
        yield Prediction("zero", np.zeros_like(truth))
        return
    # One element is some factor of any other.
    if truth[part].any() and value[part].size > 1:
        factor = slope(truth[part], value[part])
        if (shown := f"{factor:.6g}") != "1":
            yield Prediction(f"{shown} x the reference", factor * truth)
    for shift in (1, -1):
        for axis, name in zip(range(truth.ndim), ("images", "tokens"), strict=False):
            yield Prediction(f"{name} shifted by {shift}", np.roll(truth, shift, axis))
    for name, rounded in STORED.items():
        if np.array_equal(rounded(value), value):
            # It explains an error of its own size, and hides what is wrong besides where that is larger.
            if error(value, truth).rms <= _UNITS * UNIT[name]:
                yield Prediction(f"rounded to {name}", value, format=name)
            return


def slope(x: NDArray, y: NDArray) -> float:
    """The factor with which x comes closest to y, 0 where x is nothing."""
    square = np.vdot(x, x)
    return float(np.vdot(x, y) / square) if square else 0.0


# Along an axis of ten thousands of classes the distances of each to each would take gigabytes.
_LONGEST = 8192


def explain_by_order(truth: NDArray, value: NDArray, axes: tuple[str, ...]) -> Iterator[Prediction]:
    """Everything right, but along one axis not in its place: heads, channels, classes, tokens or images.

    Args:
      truth: the right value.
      value: the candidate's.
      axes: what one index of each axis is called.
    """
    for axis, (name, size) in enumerate(zip(axes, truth.shape, strict=True)):
        if size > _LONGEST:
            continue
        theirs, right = (np.moveaxis(each, axis, 0).reshape(size, -1) for each in (value, truth))
        # Squared distances of each to each, less what is the same along a row.
        order = np.argmin(np.square(right).sum(axis=1) - 2 * theirs @ right.T, axis=1)
        if len(set(order)) == size and (order != np.arange(size)).any():
            first = ", ".join(map(str, order[:4])) + (", ..." if size > 4 else "")
            yield Prediction(f"another order along the {name} axis ({first})", np.take(truth, order, axis))
