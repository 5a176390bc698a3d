"""What could have gone wrong: known porting bugs, each tried on the candidate's values at the first diverging site.

Before the first divergence all values agree with the reference, so what a bug would have made of them is one NumPy
formula. A bug is named only where that formula meets the candidate's values to within the gate: with random or trained
weights no wrong formula does so by chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.porting import Tensors
from vit_ref.verify.gaps import across, hidden_before
from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS, error
from vit_ref.verify.guesses import MULTIPLIED, STORED, UNIT, Guess, in_another_order, of_the_value
from vit_ref.verify.hypotheses import Upstream
from vit_ref.verify.oracle import NumpyOracle
from vit_ref.verify.trace import Trace

_EPS = float(np.finfo(np.float64).eps)
_AXES: dict[str | int, tuple[str, ...]] = {
    "probs": ("image", "head", "query", "key"),
    "pixels": ("image", "row", "column", "channel"),
    4: ("image", "token", "head", "channel"),
    3: ("image", "token", "channel"),
    2: ("image", "channel"),
}


class Cause(NamedTuple):
    """A bug that explains a divergence.

    Attributes:
      label: what was done, or taken, instead.
      site: the first diverging site.
      before: relative RMS error there.
      after: what is left of it against a reference with the same bug.
      format: the format that the value was rounded to, where that is the bug; else "".
    """

    label: str
    site: str
    before: float
    after: float
    format: str = ""

    def __str__(self) -> str:
        return f"{self.label}: with it the error at {self.site} falls from {self.before:.1e} to {self.after:.1e}"


def diagnose(
    config: ViTConfig,
    tensors: Tensors,
    pixels: NDArray,
    truth: Trace,
    names: list[str],
    site: str,
    exact: Trace,
) -> tuple[Cause, ...]:
    """Names the bugs that explain what a candidate shows at its first diverging site.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's, under Hugging Face's names.
      pixels: the images.
      truth: the reference's trace in float64.
      names: all sites in order.
      site: the first diverging site.
      exact: the candidate's trace in float64. Sites before this one agree with the reference, or are not shown.

    Returns:
      Every bug that fits, the best first.
    """
    value = exact[site]
    if value.shape != truth[site].shape or not np.isfinite(value).all():
        return ()
    upstream = Upstream(config, tensors, pixels, truth, site)
    causes = _explaining(upstream.guesses(), site, value, truth[site])
    if not causes:
        orders = in_another_order(truth[site], value, _axes(value, site))
        causes = _fitting(chain(upstream.with_a_number(value), orders), site, value, truth[site])
    gap = hidden_before(site, names, exact)
    if causes or not gap:
        return causes
    # The oracle has to be run for each of these, so on one image, the one that is most wrong; and the first that fits
    # is taken.
    worst = int(np.argmax(np.abs(value - truth[site]).reshape(len(value), -1).max(axis=1)))
    one = slice(worst, worst + 1)
    there = {name: truth[name][one] for name in names}
    for guess in across(config, tensors, pixels[one], there, names, site, gap):
        causes = _fitting([guess], site, value[one], there[site])
        if causes:
            before = error(value, truth[site]).rms
            return tuple(cause._replace(before=before) for cause in causes)
    return ()


# How many units of rounding a right formula may be off: a product over some thousand elements is by a dozen.
_UNITS = 64


def beyond_rounding(
    config: ViTConfig, tensors: Tensors, pixels: NDArray, names: list[str], after: Cause, shown: Trace
) -> tuple[str, float, tuple[Cause, ...]]:
    """The next divergence after one that is rounding, if rounding cannot explain it, too.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's, under Hugging Face's names.
      pixels: the images.
      names: all sites in order.
      after: the rounding that was found.
      shown: the candidate's trace in float64.

    Returns:
      The first site whose value is further from the right formula of the candidate's own values than that rounding
      allows, how far (relative RMS), and the bugs that explain it; ("", 0, ()) where there is none.
    """
    right = NumpyOracle(config, tensors).formulas(pixels, shown)
    bound = _UNITS * UNIT[after.format]
    for site in names[names.index(after.site) + 1 :]:
        value = shown.get(site)
        if value is None or (off := error(value, right[site]).rms) <= bound:
            continue
        if not np.isfinite(off):
            return site, off, ()
        upstream = Upstream(config, tensors, pixels, {**right, **shown}, site)
        return site, off, _explaining(upstream.guesses(), site, value, right[site], bound)
    return "", 0.0, ()


def _explaining(
    guesses: Iterable[Guess], site: str, value: NDArray, truth: NDArray, bound: float = SEMANTIC_RMS
) -> tuple[Cause, ...]:
    part = np.ix_(*_wrong_indices(value, truth))
    return _fitting(chain(guesses, of_the_value(truth, value, part)), site, value, truth, bound)


def _fitting(
    guesses: Iterable[Guess], site: str, value: NDArray, truth: NDArray, bound: float = SEMANTIC_RMS
) -> tuple[Cause, ...]:
    before = error(value, truth).rms
    part = np.ix_(*_wrong_indices(value, truth))
    everywhere, there_alone = [], []
    # One at a time: of a real model each guess is megabytes.
    for label, guess, *rounded in guesses:
        after = error(value, guess).rms
        if after <= bound and after < before / 4:
            everywhere.append(Cause(label, site, before, after, *rounded))
            continue
        # One head, image or token alone may have the bug, which has to explain that one and no more.
        mixed = truth.copy()
        mixed[part] = guess[part]
        after = error(value, mixed).rms
        if after <= bound and after < before / 4:
            there_alone.append(Cause(label, site, before, after, *rounded))
    causes = sorted(everywhere or there_alone, key=lambda cause: cause.after)
    # An epsilon of 1e-13 fits a port that has 1e-12, though a thousand times less well.
    return tuple(cause for cause in causes if cause.after <= 100 * max(causes[0].after, _EPS))[:3]


def diagnose_rounding(config: ViTConfig, tensors: Tensors, site: str, trace: Trace, truth: Trace) -> tuple[Cause, ...]:
    """Names the precision that explains rounding beyond the gate, where all formulas agree.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's, under Hugging Face's names.
      site: the first site beyond its gate.
      trace: the candidate's, in the tested precision.
      truth: the reference's trace in float64.
    """
    value = trace[site]
    if value.shape != truth[site].shape or not np.isfinite(value).all():
        return ()
    before = error(value, truth[site]).rms
    for name, rounded in STORED.items():
        if name in ("float32", value.dtype.name):
            continue
        if np.array_equal(rounded(value), value):
            return (Cause(f"rounded to {name}", site, before, 0.0, name),)
    # Where the candidate does not show its own values, the right ones have to do.
    known = Upstream(config, tensors, np.empty(0), {**truth, **trace}, site)
    for name, rounded in MULTIPLIED.items():
        for label, guess in known.in_format(rounded):
            after = error(value, guess).rms
            if after < before / 10:
                return (Cause(f"{label} rounded to {name}", site, before, after),)
    return ()


def diagnose_gradient(truth: NDArray, name: str, value: NDArray) -> tuple[Cause, ...]:
    """Names the simple faults that explain a gradient: a factor, nothing at all, a precision."""
    if value.shape != truth.shape or not np.isfinite(value).all():
        return ()
    return _explaining((), name, value, truth)


def where(value: NDArray, truth: NDArray, site: str) -> str:
    """How a value is wrong: its shape, or in which images, tokens, heads and channels; "" where in all of them.

    It goes on after the word "wrong".
    """
    if value.shape != truth.shape:
        return f"as its shape is {value.shape}, not {truth.shape}"
    if not np.isfinite(value).all():
        return "as it is not finite"
    said = []
    for name, indices, size in zip(_axes(value, site), _wrong_indices(value, truth), value.shape, strict=True):
        if len(indices) < size:
            few = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
            said.append(f"{name} {few} of {size}")
    return f"only at {'; '.join(said)}" if said else ""


def _axes(value: NDArray, site: str) -> tuple[str, ...]:
    """What one index of each axis is called."""
    return _AXES.get(site.rpartition(".")[2]) or _AXES[value.ndim]


def _wrong_indices(value: NDArray, truth: NDArray) -> list[NDArray]:
    """Along each axis, where an element is further out than the largest one may be."""
    limit = SEMANTIC_MAX * max(float(np.abs(truth).max()), np.finfo(np.float64).tiny)
    wrong = np.abs(value - truth) > limit
    if not wrong.any():
        wrong[...] = True
    return [
        np.flatnonzero(wrong.any(axis=tuple(k for k in range(value.ndim) if k != axis))) for axis in range(value.ndim)
    ]
