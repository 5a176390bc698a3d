"""The gates: how far a candidate may be from the oracle, and why.

The semantic gate compares float64 with float64. Float64's own rounding is ten thousand times smaller than the gate, so
a wrong formula shows there whatever its size in float32.

The numerical gate works in the tested precision. It measures with the reference's own rounding error against the same
oracle. So the gate follows the checkpoint, the depth and the device, and is not a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from scipy import special

# Two right implementations differ by some 1e-14, forward and backward. The gate leaves room above that for depth, and
# for tokens whose mean is ten times their deviation. It lies far below the smallest wrong formula: an epsilon of 1e-6
# for 1e-12 in LayerNorm at unit variance is off by 5e-7.
SEMANTIC_RMS = 1e-12
# The largest error of one element may be ten times the RMS error, because ten standard deviations do occur.
SEMANTIC_MAX = 1e-11


# Right implementations differed by up to nine times what the reference's error in float32 says of float64. There that
# error was 0.1 % to a million times the value. Few terms carry such an error, so one draw of it may be small.
_NOISE = 32


# Forward, a larger error in float64 is a wrong formula, whatever the reference's rounding is: 32 units of float64 are
# as much as 6e-8 of what one unit is of float32, so a value could lose all its digits there and be no farther off.
CLEARLY_WRONG = 1e-7


class Allowance(NamedTuple):
    """How large a candidate's error may be: multiples of the reference's own error, and units of rounding.

    Attributes:
      forward: multiple of the reference's error, at a site's value.
      backward: multiple of the reference's error, at a gradient.
      floor: units of rounding.
      foreign: a further factor, if matrix products are not XLA's. It applies to both multiples if the reference's are
        not, and to `forward` if the candidate's are not.
    """

    forward: float
    backward: float
    floor: float
    foreign: float


# forward: a right candidate that sums in another order errs about as much as the reference, up to half as much again.
# Under bfloat16 one of the two may round its softmax to 8 bits and the other not, so they may differ by a factor of
# two.
# backward: in float32 a right candidate may err twice as much, for one head. That happens if it scales the scores
# instead of the query. XLA then fuses the scale into the exponentials, their rows sum to one less exactly, and
# softmax's pull-back subtracts two nearly equal sums. In half precision the reference rounds more often than needed, so
# candidates err less. Fused attention errs more, without a bound: see `fused.py`. So a candidate that may have it is
# allowed the same multiples of the reference's error with fused attention, if that is larger.
# foreign: sums have another order outside XLA. On a CPU, XLA errs up to three times as much as PyTorch or NumPy over
# long sums, because their blocks are shorter. Over the short sums of a head PyTorch may err more than XLA. So a
# candidate in PyTorch is allowed the factor forward. Backward its sums err no more than XLA's, so it is not allowed the
# factor there. In half precision the rounding of stored values outweighs the order.
# floor: storing a value loses half a unit. The reference may be exact at a site by luck, after one product or one
# addition. A candidate must still be allowed to round twice there: one unit, as a root mean square.
ALLOWANCES: dict[str, Allowance] = {
    "float32": Allowance(forward=2.0, backward=3.0, floor=1.0, foreign=2.0),
    "bfloat16": Allowance(forward=3.0, backward=3.0, floor=1.0, foreign=1.0),
    "float16": Allowance(forward=2.0, backward=2.0, floor=1.0, foreign=1.0),
}


# A right candidate fails at a site by bad luck less often than this.
ONCE_IN = 1e-6


class Error(NamedTuple):
    """Relative errors of one value.

    Attributes:
      rms: root mean square of the error over root mean square of the value.
      max: largest error over largest value.
      carriers: how many tokens carry the error independently, or how many elements if there are no tokens. An even
        spread counts all of them, an error in one place counts one. 0 if it was not counted.
      reason: why the value cannot be compared, such as "not finite"; both errors are then infinite. "" if it can.
      noise: the relative RMS error that rounding explains in float64, see `float64_noise`. 0 if it was not looked for.
    """

    rms: float
    max: float
    carriers: float = 0.0
    reason: str = ""
    noise: float = 0.0

    @property
    def semantic_gate(self) -> float:
        """The largest RMS error in float64 of the same formula."""
        return max(SEMANTIC_RMS, self.noise)

    @property
    def semantic_max(self) -> float:
        """The largest maximum error in float64 of the same formula."""
        return max(SEMANTIC_MAX, 10 * self.noise)

    @property
    def passes_semantic_gate(self) -> bool:
        """Whether the two values can come from the same formula in float64."""
        return self.rms <= self.semantic_gate and self.max <= self.semantic_max


# By the name of a site or of a gradient.
Errors = dict[str, Error]


class Truth:
    """The right value that other values are compared with. Its size is measured once.

    Args:
      value: float64. If it is all zero, errors are absolute.
      scale: the root mean square that errors are relative to; by default that of `value`.

    Attributes:
      rms: root mean square of `value`.
    """

    def __init__(self, value: NDArray, scale: float | None = None):
        self._value = value
        largest, self.rms = _measured(value)
        self._scale = (self.rms if scale is None else scale) or 1.0
        # In this order NaN stays NaN.
        self._largest = max(largest, self._scale)

    @property
    def finite(self) -> bool:
        """Whether each of its elements is finite."""
        return math.isfinite(self._largest)

    def error(self, value: NDArray, *, carriers: bool = False) -> Error:
        """Returns the relative error of `value`. It is infinite if the shape differs or if `value` is not finite.

        Args:
          value: an array of any float dtype.
          carriers: whether to count the carriers of the error too, which doubles the time.
        """
        if value.shape != self._value.shape:
            return Error(math.inf, math.inf, reason=f"wrong shape {value.shape}, not {self._value.shape}")
        largest, rms = _measured(value, self._value)
        if not math.isfinite(largest):
            return Error(math.inf, math.inf, reason="not finite")
        relative = rms / self._scale, largest / self._largest
        return Error(*relative, _carriers(self._differences(value), largest, value.size) if carriers else 0.0)

    def _differences(self, value: NDArray) -> Iterator[NDArray]:
        return (value[cut].astype(np.float64) - self._value[cut] for cut in _cuts(self._value))


def error(value: NDArray, truth: NDArray, *, carriers: bool = False) -> Error:
    """Returns the relative error of one value, see `Truth`.

    Args:
      value: the measured value, of any float dtype.
      truth: the right value in float64.
      carriers: whether to count the carriers of the error too.
    """
    return Truth(truth).error(value, carriers=carriers)


def errors_of(found: Mapping[str, NDArray], truths: Mapping[str, Truth], *, carriers: bool = False) -> Errors:
    """Returns the errors of the values in `found`, in the order of `truths`, see `Truth.error`.

    Args:
      found: measured values by name.
      truths: right values by name.
      carriers: whether to count the carriers of the errors too.
    """
    return {name: truth.error(found[name], carriers=carriers) for name, truth in truths.items() if name in found}


def pool(found: Sequence[Error]) -> Error:
    """Returns one error of one value in several runs, as if they were one batch.

    Args:
      found: the error in each run. If a run cannot be compared, that error is returned.
    """
    if beyond := next((each for each in found if not math.isfinite(each.rms)), None):
        return beyond
    squares = [each.rms**2 for each in found]
    total = sum(squares)
    shares = sum(square**2 / each.carriers for square, each in zip(squares, found, strict=True) if each.carriers)
    carriers = total**2 / shares if shares else sum(each.carriers for each in found)
    return Error(math.sqrt(total / len(found)), max(each.max for each in found), carriers)


def wrong_sites(errors: Errors, names: Iterable[str]) -> list[str]:
    """Returns the sites whose value in float64 does not pass the semantic gate.

    Args:
      errors: errors in float64, by site.
      names: the sites in order. Those without an error are left out.
    """
    return [site for site in names if site in errors and not errors[site].passes_semantic_gate]


# So many elements stay in a core's cache. Without the cut, a dozen arrays as large as a real model's kernels would each
# pass through memory.
_AT_ONCE = 1 << 16
# So many differences are computed and summed before the next ones. Those of (4, 257, 1536) values took 2.7 times as
# long in temporary arrays of whole parts, which may be larger.
_IN_CACHE = 1 << 15
# OpenBLAS multiplies so many elements in one thread. For more it wakes others, and on a busy machine waiting for them
# takes ten times as long as the product.
_IN_ONE_THREAD = 1 << 13


def _cuts(x: NDArray) -> list[Any]:
    """Returns the indices of an array's parts, cut along its first axis."""
    rows = max(1, _AT_ONCE * len(x) // x.size) if x.ndim and x.size else 1
    return [slice(row, row + rows) for row in range(0, len(x), rows)] if x.ndim else [...]


def _sum_of_squares(x: NDArray, before: float = 0.0) -> float:
    """Returns the sum of squares of an array's elements, added to an earlier sum in the order of the elements."""
    flat, total = x.ravel(), before
    for start in range(0, flat.size, _IN_ONE_THREAD):
        cut = flat[start : start + _IN_ONE_THREAD]
        total += float(np.vdot(cut, cut))
    return total


def _measured(value: NDArray, truth: NDArray | None = None) -> tuple[float, float]:
    """Returns the largest magnitude, which is NaN if any is, and the root mean square. Both are 0 without elements.

    Args:
      value: the array.
      truth: float64. If it is given, the differences of `value` from it are measured, in float64.
    """
    largest, squares = 0.0, 0.0
    differences = np.empty(0 if truth is None else min(_IN_CACHE, value.size))
    for cut in _cuts(value):
        flat, of_part = value[cut].reshape(-1), 0.0
        right = None if truth is None else truth[cut].reshape(-1)
        for start in range(0, flat.size, _IN_CACHE):
            block = flat[start : start + _IN_CACHE]
            if right is not None:
                found = differences[: block.size]
                block = np.subtract(block, right[start : start + _IN_CACHE], out=found)
            # NumPy's maximum keeps NaN. This form also needs no array of absolute values.
            largest = float(np.maximum(largest, np.maximum(block.max(), -block.min())))
            of_part = _sum_of_squares(block, of_part)
        squares += of_part
    return largest, math.sqrt(squares / max(value.size, 1))  # such as the register tokens of a model that has none


def _carriers(differences: Iterable[NDArray], largest: float, size: int) -> float:
    if not largest:
        return float(size)
    elements, outputs, tokens = _Participation(), _Participation(), (_Participation(), _Participation())
    for difference in differences:
        squares = np.square(difference / largest)  # undivided, their own squares would underflow
        axes = squares.ndim
        elements.add(squares)
        if axes == 2:
            outputs.add(squares.sum(axis=1))
        # If there are four axes, the second or the third (in attention's probabilities) are tokens; heads are fewer.
        for token in (1,) if axes == 3 else (1, 2) if axes > 3 else ():
            tokens[token - 1].add(squares.sum(axis=tuple(axis for axis in range(1, axes) if axis != token)))
    # The fourth moment of normal errors is three times the square of the second.
    alone = min(float(size), 3 * elements.parts)
    if axes < 2:
        return alone
    if axes == 2:
        # An image's outputs come from one token and err together, but not all in one direction. So the count lies
        # between the number of images and the number of elements.
        return math.sqrt(alone * outputs.parts)
    # The channels of a token err together, because they share its mean and its deviation.
    return max(each.parts for each in tokens)


class _Participation:
    """Counts into how many equal parts a sum of squares falls: 1 if one square is all of it."""

    def __init__(self) -> None:
        self._sum = self._sum_of_squares = 0.0

    def add(self, squares: NDArray) -> None:
        self._sum += float(squares.sum())
        self._sum_of_squares += _sum_of_squares(squares)

    @property
    def parts(self) -> float:
        return self._sum**2 / self._sum_of_squares if self._sum else 0.0


def apart(value: float, limit: float, digits: int = 1, kind: str = "e") -> tuple[str, str]:
    """Returns two numbers as text, with enough digits to tell them apart and at least `digits`.

    Args:
      value: the measured number.
      limit: the number that it is compared with.
      digits: the precision to begin with.
      kind: the presentation type of `format`, "e" or "g".
    """
    texts = f"{value:.{digits}{kind}}", f"{limit:.{digits}{kind}}"
    # 17 significant digits tell any two floats apart.
    return apart(value, limit, digits + 1, kind) if texts[0] == texts[1] and value != limit and digits < 17 else texts


def against(error: float, gate: float) -> str:
    """Returns an error beside its gate: "1.93e-06, gate 1.85e-06"."""
    value, limit = apart(error, gate)
    return f"{value}, gate {limit.replace('.0e', 'e')}"


def root_mean_square(x: NDArray) -> float:
    """Returns sqrt(mean(x^2)) over all elements."""
    return math.sqrt(float(np.vdot(x, x)) / x.size)


def float64_noise(reference: float) -> float:
    """Returns the relative RMS error by which right implementations may differ in float64.

    It is told from the reference's error in float32, by the ratio of the units of rounding. It lies below the semantic
    gate unless the value is ill-conditioned: the reference then errs by more than 1.7e-5 in float32. So do gradients of
    attention to a single token, which are zero but for terms that cancel, and those of a norm over two channels.

    Args:
      reference: the reference's relative RMS error in float32.
    """
    if not math.isfinite(reference):
        return 0.0
    return _NOISE * reference * float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)


def numerical_gate(
    reference: float, dtype: DTypeLike, carriers: float, *, backward: bool = False, foreign: bool = False
) -> float:
    """Returns the largest relative RMS error that a candidate may have at a site.

    Args:
      reference: the reference's own relative RMS error at the site.
      dtype: the dtype of the tested precision.
      carriers: how many tokens or elements carry that error. If they are few, two right implementations may differ much
        by luck. Two root mean squares of so many normal errors differ by more than the factor allowed here once in a
        million. From 64 on that factor is below the usual one.
      backward: whether the value is a gradient.
      foreign: whether reference and candidate sum in another order, see `ALLOWANCES`.
    """
    allowance = ALLOWANCES[np.dtype(dtype).name]
    factor = (allowance.backward if backward else allowance.forward) * (allowance.foreign if foreign else 1)
    by_luck = math.sqrt(special.fdtri(carriers, carriers, 1 - ONCE_IN))
    return max(factor, by_luck) * reference + allowance.floor * float(ml_dtypes.finfo(dtype).eps)
