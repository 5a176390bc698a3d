"""The gates: how far a candidate may be from the oracle, and why exactly that far.

Semantic gate, float64 against float64: a wrong formula shows here whatever its size in float32, because float64's own
rounding is ten thousand times smaller than the gate. Numerical gate, in the tested precision: the measure is the
reference's own rounding error against the same oracle, so the gate follows the checkpoint, the depth and the device
instead of a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from scipy import special

# Seen on a trained ViT-S/14 and on ViT-B/16-sized random weights: two right implementations differ by at most 1.4e-14
# (relative RMS) anywhere, forward or backward. The gate leaves the rest for depth and for tokens whose mean is ten
# times their deviation, where 2.3e-13 was seen. The smallest wrong formula of the catalogue, an epsilon of 1e-6 for
# 1e-12 in LayerNorm at unit variance, is 5e-7.
SEMANTIC_RMS = 1e-12
# One element may be further out than the whole: ten standard deviations are.
SEMANTIC_MAX = 1e-11


class Allowance(NamedTuple):
    """How much of the reference's own error a candidate may make, and how many units of rounding besides.

    Attributes:
      forward: multiple of the reference's error, at a site's value.
      backward: the same, at a gradient.
      floor: units of rounding.
      foreign: factor to both multiples where the reference's matrix products are not XLA's, and to `forward` where the
        candidate's are not.
    """

    forward: float
    backward: float
    floor: float
    foreign: float


# forward: right ports that order their sums otherwise came out between 0.7 and 1.4 times the reference; under bfloat16,
# where a reference rounds its softmax to 8 bits and a port may not (or the other way round), between 0.4 and 2.
# backward: in float32 up to 2.0, seen where the scores are scaled instead of the query, for one head of 33: XLA fuses
# the scale into the exponentials, their rows then sum to one less exactly, and softmax's pull-back subtracts two nearly
# equal sums. In half precision, where the reference rounds more often than needed, between 0.4 and 1. Fused attention
# errs more, without a bound: see `fused.py`. A candidate that may have it is allowed the same multiples of what the
# reference errs with fused attention of its own, where that is more.
# foreign: sums have another order there. On a CPU a product over 3072 elements errs in XLA 2.9 times as much as in
# PyTorch and 2.4 times as much as in NumPy, whose blocks are shorter; over up to 8192 elements at most 3.1 times. On
# ViT-B/16 that made 2.2 at an MLP's output. Nor is XLA always the worse: over the 64 elements of a head PyTorch erred
# 2.4 times as much as XLA, in one head of a trained ViT-S/14 whose scores reach 300, and the probabilities with it. A
# candidate in PyTorch is therefore allowed the factor forward. Backward its sums err no more than a reference's in XLA,
# so it is not allowed the factor there. In half precision the rounding of what is stored outweighs it.
# floor: half a unit is lost when a value is stored at all, so a site that the reference computes exactly by luck (one
# product, one addition) must still allow a candidate to round twice: one unit, as a root mean square.
ALLOWANCES: dict[str, Allowance] = {
    "float32": Allowance(forward=2.0, backward=3.0, floor=1.0, foreign=2.0),
    "bfloat16": Allowance(forward=3.0, backward=3.0, floor=1.0, foreign=1.0),
    "float16": Allowance(forward=2.0, backward=2.0, floor=1.0, foreign=1.0),
}


# A right port fails by luck at a site less often than this.
ONCE_IN = 1e-6


class Error(NamedTuple):
    """Relative errors of a value.

    Attributes:
      rms: root mean square over root mean square.
      max: largest over largest.
      carriers: how many tokens, or elements where there are no tokens, carry the error independently: all of them where
        it is spread evenly, one where it is in one. 0 where nobody asked.
      reason: why there is no error to measure, such as "not finite"; both errors are then infinite. "" where there is.
    """

    rms: float
    max: float
    carriers: float = 0.0
    reason: str = ""

    @property
    def passes_semantic_gate(self) -> bool:
        """Whether the two values can be the same formula in float64."""
        return self.rms <= SEMANTIC_RMS and self.max <= SEMANTIC_MAX


# By the name of a site, or of a gradient.
Errors = dict[str, Error]


class Truth:
    """What any number of values are compared with: its own size is measured once for all.

    Args:
      value: float64. Where it is all zero, errors are absolute.
      scale: the root mean square that errors are relative to, by default the truth's own.

    Attributes:
      rms: its own root mean square.
    """

    def __init__(self, value: NDArray, scale: float | None = None):
        self._value = value
        largest, self.rms = _measured(part for _, part in _parts(value))
        self._scale = (self.rms if scale is None else scale) or 1.0
        self._largest = max(largest, self._scale)

    def error(self, value: NDArray, *, carriers: bool = False) -> Error:
        """The relative error of `value`, infinite where it has another shape or is not finite.

        Args:
          value: any float dtype.
          carriers: count them too, which takes as long again as all else.
        """
        if value.shape != self._value.shape:
            return Error(math.inf, math.inf, reason=f"wrong shape {value.shape}, not {self._value.shape}")
        largest, rms = _measured(self._differences(value))
        if not math.isfinite(largest):
            return Error(math.inf, math.inf, reason="not finite")
        relative = rms / self._scale, largest / self._largest
        return Error(*relative, _carriers(self._differences(value), largest, value.size) if carriers else 0.0)

    def _differences(self, value: NDArray) -> Iterator[NDArray]:
        return (value[rows].astype(np.float64) - part for rows, part in _parts(self._value))


def error(value: NDArray, truth: NDArray, *, carriers: bool = False) -> Error:
    """The relative error of one value, see `Truth`."""
    return Truth(truth).error(value, carriers=carriers)


def errors_of(found: Mapping[str, NDArray], truths: Mapping[str, Truth], *, carriers: bool = False) -> Errors:
    """The errors of those values that were found, in the order of the truths, see `Truth.error`."""
    return {name: truth.error(found[name], carriers=carriers) for name, truth in truths.items() if name in found}


# What is computed of so many elements stays in a core's cache. A dozen arrays as large as a real model's kernels would
# each pass through memory otherwise.
_AT_ONCE = 1 << 16


def _parts(x: NDArray) -> Iterator[tuple[Any, NDArray]]:
    """An array cut along its first axis, and where."""
    rows = max(1, _AT_ONCE * len(x) // x.size) if x.ndim and x.size else 1
    cuts = [slice(row, row + rows) for row in range(0, len(x), rows)] if x.ndim else [...]
    return ((cut, x[cut]) for cut in cuts)


def _measured(parts: Iterable[NDArray]) -> tuple[float, float]:
    """The largest magnitude, NaN where one is, and the root mean square."""
    largest, squares, size = 0.0, 0.0, 0
    for part in parts:
        # NumPy's maximum keeps NaN. Nor is there an array of absolute values.
        largest = float(np.maximum(largest, np.maximum(part.max(), -part.min())))
        squares += float(np.vdot(part, part))
        size += part.size
    return largest, math.sqrt(squares / size)


def _carriers(differences: Iterable[NDArray], largest: float, size: int) -> float:
    if not largest:
        return float(size)
    elements, outputs, tokens = _Participation(), _Participation(), (_Participation(), _Participation())
    for difference in differences:
        squares = np.square(difference / largest)  # whose own squares would else underflow
        axes = squares.ndim
        elements.add(squares)
        if axes == 2:
            outputs.add(squares.sum(axis=1))
        # Of four axes the second or, in attention's probabilities, the third are tokens; heads are fewer.
        for token in (1,) if axes == 3 else (1, 2) if axes > 3 else ():
            tokens[token - 1].add(squares.sum(axis=tuple(axis for axis in range(1, axes) if axis != token)))
    # Of normal errors the fourth moment is three times the second's square.
    alone = min(float(size), 3 * elements.parts)
    if axes < 2:
        return alone
    if axes == 2:
        # An image's outputs come from one token and err together, though not in one direction only: something between
        # the images and the elements.
        return math.sqrt(alone * outputs.parts)
    # A token's channels err together: they have its mean and its deviation in common.
    return max(each.parts for each in tokens)


class _Participation:
    """Into how many equal parts a sum of squares falls: 1 where one of them is all of it."""

    def __init__(self) -> None:
        self._sum = self._sum_of_squares = 0.0

    def add(self, squares: NDArray) -> None:
        self._sum += float(squares.sum())
        self._sum_of_squares += float(np.vdot(squares, squares))

    @property
    def parts(self) -> float:
        return self._sum**2 / self._sum_of_squares if self._sum else 0.0


def apart(value: float, limit: float, digits: int = 1, kind: str = "e") -> tuple[str, str]:
    """Two numbers as text, with as many digits as tell the two apart, and at least `digits`.

    Args:
      value: what was measured.
      limit: what it is compared with.
      digits: the precision to begin with.
      kind: the presentation type of `format`, "e" or "g".
    """
    texts = f"{value:.{digits}{kind}}", f"{limit:.{digits}{kind}}"
    # 17 significant digits tell any two floats apart.
    return apart(value, limit, digits + 1, kind) if texts[0] == texts[1] and value != limit and digits < 17 else texts


def against(error: float, gate: float) -> str:
    """An error beside its gate: "1.93e-06, gate 1.85e-06"."""
    value, limit = apart(error, gate)
    return f"{value}, gate {limit.replace('.0e', 'e')}"


def root_mean_square(x: NDArray) -> float:
    """sqrt(mean(x^2)) over all elements."""
    return math.sqrt(float(np.vdot(x, x)) / x.size)


def numerical_gate(
    reference: float, dtype: DTypeLike, carriers: float, *, backward: bool = False, foreign: bool = False
) -> float:
    """The largest relative RMS error that a candidate may have at a site.

    Args:
      reference: the reference's own error there.
      dtype: the tested precision.
      carriers: how many tokens or elements carry that error. Where they are few, two right implementations may err
        quite differently by luck: two root mean squares of so many normal errors are further apart than the factor
        allowed here once in a million. From 64 on that is less than the usual factor.
      backward: whether it is a gradient.
      foreign: whether the two sum in another order because one of them is no jax program, see `ALLOWANCES`.
    """
    allowance = ALLOWANCES[np.dtype(dtype).name]
    factor = (allowance.backward if backward else allowance.forward) * (allowance.foreign if foreign else 1)
    by_luck = math.sqrt(special.fdtri(carriers, carriers, 1 - ONCE_IN))
    return max(factor, by_luck) * reference + allowance.floor * float(ml_dtypes.finfo(dtype).eps)
