"""What could have gone wrong: known porting bugs, each tried on the candidate's values at the first diverging site.

Before the first divergence all values agree with the reference, so the oracle makes of them what a bug would have made.
A bug is named only where that meets the candidate's values to within the gate: with random or trained weights no wrong
formula does so by chance.
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
from vit_ref.verify.formats import MULTIPLIED, STORED, UNIT
from vit_ref.verify.gates import error
from vit_ref.verify.problem import hidden_before
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.results import Cause
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
    found = Divergence(site, exact[site], truth[site])
    if not found.comparable:
        return ()
    oracle = NumpyOracle(config, tensors)
    known = oracle.before(site, truth)
    causes = found.causes(_explain(list_bugs_at(oracle, site, known), found, oracle, pixels, known), found.by_value())
    if not causes:
        numbered = fit_bugs(oracle, site, known, found.value, found.truth)
        orders = explain_by_order(found.truth, found.value, _axes(found.value, site))
        causes = found.causes(_explain(numbered, found, oracle, pixels, known), orders)
    gap = hidden_before(site, names, exact)
    if causes or not gap:
        return causes
    # The oracle has to be run for each of these, so on one image, and the first that fits is taken.
    image = found.worst
    one = found._replace(value=found.value[image], truth=found.truth[image])
    of_image = {name: value[image] for name, value in known.items()}
    for explanation in explain_across(oracle, site, pixels[image], of_image, gap):
        if causes := one.causes([explanation]):
            before = error(found.value, found.truth).rms
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
    oracle = NumpyOracle(config, tensors)
    right = oracle.formulas(pixels, shown)
    bound = _UNITS * UNIT[after.format]
    for site in names[names.index(after.site) + 1 :]:
        value = shown.get(site)
        if value is None or (off := error(value, right[site]).rms) <= bound:
            continue
        found = Divergence(site, value, right[site], bound)
        if not found.comparable:
            return site, off, ()
        known = {**right, **shown}
        bugs = _explain(list_bugs_at(oracle, site, known), found, oracle, pixels, known)
        return site, off, found.causes(bugs, found.by_value())
    return "", 0.0, ()


def _explain(
    bugs: Iterable[KnownBug], found: Divergence, oracle: NumpyOracle, pixels: NDArray, known: Trace
) -> Iterator[Prediction]:
    """Tries bugs on the image that is most wrong, and on all images those that explain this one."""
    image = found.worst
    one, of_image = found.value[image], {name: value[image] for name, value in known.items()}
    wrong = np.ix_(np.zeros(1, int), *find_wrong(found.value, found.truth)[1:])
    # The bound is relative to what the bug makes, which differs from the value by a quarter at most if it explains it.
    allowed = 2 * found.bound * float(np.linalg.norm(found.value))
    for bug in bugs:
        if np.linalg.norm((bug.value(oracle, found.site, pixels[image], of_image) - one)[wrong]) <= allowed:
            yield Prediction(bug.label, bug.value(oracle, found.site, pixels, known))


def diagnose_rounding(config: ViTConfig, tensors: Tensors, site: str, trace: Trace, truth: Trace) -> tuple[Cause, ...]:
    """Names the precision that explains rounding beyond the gate, where all formulas agree.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's, under Hugging Face's names.
      site: the first site beyond its gate.
      trace: the candidate's, in the tested precision.
      truth: the reference's trace in float64.
    """
    found = Divergence(site, trace[site], truth[site])
    if not found.comparable:
        return ()
    value, before = found.value, error(found.value, found.truth).rms
    for name, rounded in STORED.items():
        if name in ("float32", value.dtype.name):
            continue
        if np.array_equal(rounded(value), value):
            return (Cause(f"rounded to {name}", site, before, 0.0, name),)
    # Where the candidate does not show its own values, the right ones have to do.
    oracle, known = NumpyOracle(config, tensors), {**truth, **trace}
    for name, rounded in MULTIPLIED.items() if "pixels" not in oracle.reads(site) else ():
        for bug in list_roundings(site, rounded):
            after = error(value, bug.value(oracle, site, np.empty(0), known)).rms
            if after < before / 10:
                return (Cause(f"{bug.label} rounded to {name}", site, before, after),)
    return ()


def diagnose_gradient(truth: NDArray, name: str, value: NDArray) -> tuple[Cause, ...]:
    """Names the simple faults that explain a gradient: a factor, nothing at all, a precision."""
    found = Divergence(name, value, truth)
    return found.causes(found.by_value()) if found.comparable else ()


def where(value: NDArray, truth: NDArray, site: str) -> str:
    """How a value is wrong: its shape, or in which images, tokens, heads and channels; "" where in all of them.

    It goes on after the word "wrong".
    """
    if value.shape != truth.shape:
        return f"shape {value.shape}, not {truth.shape}"
    if not np.isfinite(value).all():
        return "because it is not finite"
    said = []
    for name, indices, size in zip(_axes(value, site), find_wrong(value, truth), value.shape, strict=True):
        if len(indices) < size:
            few = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
            said.append(f"{name} {few} of {size}")
    return f"only at {'; '.join(said)}" if said else ""


def _axes(value: NDArray, site: str) -> tuple[str, ...]:
    """What one index of each axis is called."""
    return _AXES.get(site.rpartition(".")[2]) or _AXES[value.ndim]
