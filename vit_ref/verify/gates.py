"""The gates: how far a candidate may be from the oracle, and why exactly that far.

Semantic gate, float64 against float64: a wrong formula shows here whatever its size in float32, because float64's own
rounding is ten thousand times smaller than the gate. Numerical gate, in the tested precision: the yardstick is the
reference's own rounding error against the same oracle, so the gate follows the checkpoint, the depth and the device
instead of a guess.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
      foreign: factor to both multiples where the reference's matrix products are not XLA's.
    """

    forward: float
    backward: float
    floor: float
    foreign: float


# forward: right ports that order their sums otherwise came out between 0.7 and 1.4 times the reference; under bfloat16,
# where a reference rounds its softmax to 8 bits and a port may not (or the other way round), between 0.4 and 2.
# backward: in float32 up to 2.0, seen where the scores are scaled instead of the query, for one head of 33: XLA fuses
# the scale into the exponentials, their rows then sum to one less exactly, and softmax's pull-back subtracts two nearly
# equal sums. In half precision, where the reference rounds more often than needed, between 0.4 and 1.
# foreign: sums have another order there. On a CPU a product over 3072 elements errs in XLA 2.9 times as much as in
# PyTorch and 2.4 times as much as in NumPy, whose blocks are shorter; over up to 8192 elements at most 3.1 times. On
# ViT-B/16 that made 2.2 at an MLP's output. In half precision the rounding of what is stored outweighs it.
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
    """

    rms: float
    max: float
    carriers: float = 0.0

    @property
    def passes_semantic_gate(self) -> bool:
        """Whether the two values can be the same formula in float64."""
        return self.rms <= SEMANTIC_RMS and self.max <= SEMANTIC_MAX


def error(value: NDArray, truth: NDArray, scale: float | None = None, *, carriers: bool = False) -> Error:
    """The relative error of `value`, infinite where it has another shape or is not finite.

    Args:
      value: any float dtype.
      truth: float64. Where it is all zero, the error is absolute.
      scale: the root mean square that the error is relative to, by default the truth's own.
      carriers: count them too, which takes as long again as all else.
    """
    if value.shape != truth.shape:
        return Error(math.inf, math.inf)
    difference = value.astype(np.float64) - truth
    largest = _largest(difference)
    if not math.isfinite(largest):
        return Error(math.inf, math.inf)
    scale_rms = (root_mean_square(truth) if scale is None else scale) or 1.0
    relative = root_mean_square(difference) / scale_rms, largest / max(_largest(truth), scale_rms)
    return Error(*relative, _carriers(difference, largest) if carriers else 0.0)


def _largest(x: NDArray) -> float:
    """max(|x|), NaN where one is; without an array of absolute values, of which a report would make gigabytes."""
    return max(float(x.max()), -float(x.min()))


def _carriers(difference: NDArray, largest: float) -> float:
    if not largest:
        return float(difference.size)
    squares = np.square(difference / largest)  # whose own squares would else underflow
    # Of normal errors the fourth moment is three times the second's square.
    elements = min(float(squares.size), 3 * _participation(squares))
    if squares.ndim < 2:
        return elements
    if squares.ndim == 2:
        # An image's outputs come from one token and err together, though not in one direction only: something between
        # the images and the elements.
        return math.sqrt(elements * _participation(squares.sum(axis=1)))
    # A token's channels err together: they have its mean and its deviation in common. Of four axes the second or, in
    # attention's probabilities, the third are tokens; heads are fewer.
    tokens = (1,) if squares.ndim == 3 else (1, 2)
    others = [tuple(axis for axis in range(1, squares.ndim) if axis != token) for token in tokens]
    return max(_participation(squares.sum(axis=axes)) for axes in others)


def _participation(squares: NDArray) -> float:
    """Into how many equal parts a sum of squares falls: 1 where one of them is all of it."""
    return float(squares.sum()) ** 2 / float(np.vdot(squares, squares))


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
      foreign: whether the reference is no jax program, and sums in another order than any candidate in jax.
    """
    allowance = ALLOWANCES[np.dtype(dtype).name]
    factor = (allowance.backward if backward else allowance.forward) * (allowance.foreign if foreign else 1)
    by_luck = math.sqrt(special.fdtri(carriers, carriers, 1 - ONCE_IN))
    return max(factor, by_luck) * reference + allowance.floor * float(ml_dtypes.finfo(dtype).eps)
