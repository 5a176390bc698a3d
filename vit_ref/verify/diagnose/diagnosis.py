"""Finds likely causes: tries known porting bugs on the candidate's values at the first diverging site.

All values before the first divergence agree with the reference. So the oracle can compute from them what each bug would
produce. A bug is named only if its value agrees with the candidate's to within the gate. With random or trained weights
no other formula agrees by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.diagnose.divergence import Divergence, find_wrong
from vit_ref.verify.diagnose.gaps import explain_across
from vit_ref.verify.diagnose.known_bugs import KnownBug, fit_bugs, list_bugs_at, list_roundings
from vit_ref.verify.diagnose.predictions import Prediction, explain_by_order
from vit_ref.verify.gates import error
from vit_ref.verify.problem import hidden_before
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.results import Cause
from vit_ref.verify.rounding import MULTIPLIED, STORED, UNIT
from vit_ref.weights.mapping import Tensors

_AXES: dict[str | int, tuple[str, ...]] = {
    "probs": ("image", "head", "query", "key"),
    "pixels": ("image", "row", "column", "channel"),
    4: ("image", "token", "head", "channel"),
    3: ("image", "token", "channel"),
    2: ("image", "channel"),
}


def diagnose(
    config: ViTConfig,
    tensors: Tensors,
    pixels: NDArray,
    truth: Trace,
    names: list[str],
    site: str,
    exact: Trace,
) -> tuple[Cause, ...]:
    """Names the known bugs that explain a candidate's value at its first diverging site.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's tensors under Hugging Face's names.
      pixels: float32 images (B, height, width, C).
      truth: the reference's float64 trace.
      names: all sites in order.
      site: the first diverging site.
      exact: the candidate's float64 trace. Sites before `site` agree with the reference or are not shown.

    Returns:
      Every bug that fits, the best first; empty if none fits.
    """
    divergence = Divergence(site, exact[site], truth[site])
    if not divergence.comparable:
        return ()
    oracle = NumpyOracle(config, tensors)
    known = oracle.before(site, truth)
    causes = divergence.causes(
        _explain(list_bugs_at(oracle, site, known), divergence, oracle, pixels, known), divergence.by_value()
    )
    if not causes:
        numbered = fit_bugs(oracle, site, known, divergence.value, divergence.truth)
        orders = explain_by_order(divergence.truth, divergence.value, _axes(divergence.value, site))
        causes = divergence.causes(_explain(numbered, divergence, oracle, pixels, known), orders)
    gap = hidden_before(site, names, exact)
    if causes or not gap:
        return causes
    # These need a run of the oracle each. So they are tried on one image, and the first that fits is taken.
    image = divergence.worst
    one = divergence._replace(value=divergence.value[image], truth=divergence.truth[image])
    of_image = {name: value[image] for name, value in known.items()}
    for explanation in explain_across(oracle, site, pixels[image], of_image, gap):
        if causes := one.causes([explanation]):
            before = error(divergence.value, divergence.truth).rms
            return tuple(cause._replace(before=before) for cause in causes)
    return ()


# How many units of rounding a right formula may be off. A product over some thousand elements is off by a dozen.
_UNITS = 64


def beyond_rounding(
    config: ViTConfig, tensors: Tensors, pixels: NDArray, names: list[str], after: Cause, shown: Trace
) -> tuple[str, float, tuple[Cause, ...]]:
    """Finds the next divergence that an earlier rounding does not explain.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's tensors under Hugging Face's names.
      pixels: float32 images (B, height, width, C).
      names: all sites in order.
      after: the rounding that explains the first divergence.
      shown: the candidate's float64 trace.

    Returns:
      The first later site whose value is further from the right formula, applied to the candidate's own values, than
      that rounding allows. Then its relative RMS error, and the bugs that explain it. ("", 0, ()) if there is no such
      site.
    """
    oracle = NumpyOracle(config, tensors)
    right = oracle.formulas(pixels, shown)
    bound = _UNITS * UNIT[after.format]
    for site in names[names.index(after.site) + 1 :]:
        value = shown.get(site)
        if value is None or (off := error(value, right[site]).rms) <= bound:
            continue
        divergence = Divergence(site, value, right[site], bound)
        if not divergence.comparable:
            return site, off, ()
        known = {**right, **shown}
        bugs = _explain(list_bugs_at(oracle, site, known), divergence, oracle, pixels, known)
        return site, off, divergence.causes(bugs, divergence.by_value())
    return "", 0.0, ()


def _explain(
    bugs: Iterable[KnownBug], divergence: Divergence, oracle: NumpyOracle, pixels: NDArray, known: Trace
) -> Iterator[Prediction]:
    """Tries bugs on the image with the largest error, and on all images those bugs that explain this one."""
    image = divergence.worst
    one, of_image = divergence.value[image], {name: value[image] for name, value in known.items()}
    wrong = np.ix_(np.zeros(1, int), *find_wrong(divergence.value, divergence.truth)[1:])
    # The bound is relative to the bug's value. If the bug explains the value, the two differ by a quarter at most.
    allowed = 2 * divergence.bound * float(np.linalg.norm(divergence.value))
    for bug in bugs:
        if np.linalg.norm((bug.value(oracle, divergence.site, pixels[image], of_image) - one)[wrong]) <= allowed:
            yield Prediction(bug.label, bug.value(oracle, divergence.site, pixels, known))


def diagnose_rounding(config: ViTConfig, tensors: Tensors, site: str, trace: Trace, truth: Trace) -> tuple[Cause, ...]:
    """Names the lower precision that explains rounding beyond the gate, after all formulas agreed in float64.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's tensors under Hugging Face's names.
      site: the first site beyond its gate.
      trace: the candidate's trace in the tested precision.
      truth: the reference's float64 trace.

    Returns:
      The best cause, or nothing.
    """
    divergence = Divergence(site, trace[site], truth[site])
    if not divergence.comparable:
        return ()
    value, before = divergence.value, error(divergence.value, divergence.truth).rms
    for name, rounded in STORED.items():
        if name in ("float32", value.dtype.name):
            continue
        if np.array_equal(rounded(value), value):
            return (Cause(f"rounded to {name}", site, before, 0.0, name),)
    # The right values stand in for those that the candidate does not show.
    oracle, known = NumpyOracle(config, tensors), {**truth, **trace}
    for name, rounded in MULTIPLIED.items() if "pixels" not in oracle.reads(site) else ():
        for bug in list_roundings(site, rounded):
            after = error(value, bug.value(oracle, site, np.empty(0), known)).rms
            if after < before / 10:
                return (Cause(f"{bug.label} rounded to {name}", site, before, after),)
    return ()


def diagnose_gradient(truth: NDArray, name: str, value: NDArray) -> tuple[Cause, ...]:
    """Names the simple faults that explain a gradient: a factor, zeros, a lower precision, a shift.

    Args:
      truth: the right gradient in float64.
      name: the gradient's name.
      value: the candidate's gradient in float64.
    """
    divergence = Divergence(name, value, truth)
    return divergence.causes(divergence.by_value()) if divergence.comparable else ()


def where(value: NDArray, truth: NDArray, site: str) -> str:
    """Returns how a value is wrong, to be read after the word "wrong".

    Args:
      value: the candidate's value.
      truth: the right value.
      site: the site's name.

    Returns:
      Its shape, or the images, tokens, heads and channels that are wrong; "" if all of it is wrong.
    """
    if value.shape != truth.shape:
        return f"shape {value.shape}, not {truth.shape}"
    if not np.isfinite(value).all():
        return "because it is not finite"
    places = []
    for name, indices, size in zip(_axes(value, site), find_wrong(value, truth), value.shape, strict=True):
        if len(indices) < size:
            few = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
            places.append(f"{name} {few} of {size}")
    return f"only at {'; '.join(places)}" if places else ""


def _axes(value: NDArray, site: str) -> tuple[str, ...]:
    """Returns the name of one index along each axis."""
    return _AXES.get(site.rpartition(".")[2]) or _AXES[value.ndim]
