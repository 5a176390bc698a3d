"""Rounding against its gates, and rounding on nearby inputs if bad luck may explain an error.

Nearby inputs differ by a few units of rounding. The formulas see the same numbers there, and each error is drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.compare.inputs import Inputs, is_float, is_same, map_arrays
from vit_ref.verify.compare.protocols import Observable, Reference
from vit_ref.verify.compare.trace import require_float64
from vit_ref.verify.gates import Error, Errors, Truth, errors_of, numerical_gate, pool
from vit_ref.verify.precision import FLOAT64, Precision

# One operation may carry the whole error of a site and round right every second time. Over so many further inputs a
# reference is lucky each time less than once in a hundred. A norm over two channels, right in both frameworks, erred by
# 5.5e-8 or 1.2e-6, whichever framework it was.
NEARBY = 7
# Few enough that values stay as ill-conditioned as they are, and enough that each is rounded anew.
_UNITS = 8


class Rounding(NamedTuple):
    """The rounding of reference and candidate, by site in the order of the pass.

    Attributes:
      reference: the reference's errors, with their carriers.
      candidate: the candidate's errors. A site that it does not show is missing.
      precision: the tested precision.
      foreign: see `numerical_gate`.
      nearby: on how many inputs beside the given ones the errors were measured too.
    """

    reference: Errors
    candidate: Errors
    precision: Precision
    foreign: bool
    nearby: int = 0

    def gate(self, site: str, most: float = math.inf) -> float:
        """Returns the gate of a site.

        Args:
          site: the site.
          most: the largest count of carriers.
        """
        own = self.reference[site]
        return numerical_gate(own.rms, self.precision.dtype, min(own.carriers, most), foreign=self.foreign)

    @property
    def beyond(self) -> list[str]:
        """The sites whose error is beyond their gate, in order."""
        shown = (site for site in self.reference if site in self.candidate)
        return [site for site in shown if self.candidate[site].rms > self.gate(site)]

    def spread(self, carriers: Mapping[str, float]) -> frozenset[str]:
        """Returns the sites beyond their gates whose errors are spread too evenly for bad luck.

        A gate allows for the luck of as many tokens as carry the reference's error. That is too little if the reference
        was lucky at the one token where right implementations err most.

        Args:
          carriers: how many tokens carry the candidate's error, by site, for those beyond their gates.
        """
        return frozenset(site for site, count in carriers.items() if self.candidate[site].rms > self.gate(site, count))


def nearby_inputs(inputs: Inputs, precision: Precision) -> list[Any]:
    """Returns inputs beside the given ones; none if there is nothing to move.

    Whole numbers stay as they are, because they may be masks or token ids. Others move towards zero, so that what lay
    within bounds still does.

    Args:
      inputs: the inputs.
      precision: the tested precision, whose unit of rounding is the measure.
    """
    most = _UNITS * precision.epsilon

    def moved(value: NDArray) -> NDArray:
        if not is_float(value):
            return value
        nearer = value * (1 - most * rng.random(value.shape))
        return np.where(value == np.trunc(value), value, nearer).astype(value.dtype)

    found = []
    for seed in range(NEARBY):
        rng = np.random.default_rng(seed)
        found.append(map_arrays(moved, inputs))
    return [] if is_same(found[0], inputs) else found


def measure_nearby(
    inputs: Inputs, reference: Reference, candidate: Observable, first: Rounding, spread: Container[str]
) -> Rounding:
    """Returns rounding over the given inputs and over those beside them that reference and candidate can be run on.

    Errors are pooled, so that bad luck counts for both sides. A site beyond its gate also has to be within it where
    each side errs least, because bad luck has an end. That alone decides if its error is spread evenly: such an error
    may come from bad luck at an earlier site.

    Args:
      inputs: the given inputs.
      reference: the implementation that decides.
      candidate: the implementation under test.
      first: the rounding on the given inputs.
      spread: see `Rounding.spread`.
    """
    runs = [(first.reference, first.candidate)]
    for nearby in nearby_inputs(inputs, first.precision):
        try:
            found = _measured(nearby, reference, candidate, first)
        except Exception:  # such as a person's own check of the inputs, which passed the given ones
            continue
        if found:
            runs.append(found)
    own, theirs = (_joined([run[k] for run in runs], pool) for k in (0, 1))
    least = first._replace(
        reference=_joined([run[0] for run in runs], _least), candidate=_joined([run[1] for run in runs], _least)
    )
    for site in first.beyond:
        if site in spread or least.candidate[site].rms > least.gate(site):
            own[site], theirs[site] = least.reference[site], least.candidate[site]
    return first._replace(reference=own, candidate=theirs, nearby=len(runs) - 1)


def _joined(runs: Sequence[Errors], join: Callable[[Sequence[Error]], Error]) -> Errors:
    return {site: join([errors[site] for errors in runs]) for site in runs[0]}


def _least(errors: Sequence[Error]) -> Error:
    """Returns the smallest error, or one that is not finite: no luck makes one."""
    beyond = next((error for error in errors if not math.isfinite(error.rms)), None)
    return beyond or min(errors, key=lambda error: error.rms)


def _measured(
    inputs: Inputs, reference: Reference, candidate: Observable, first: Rounding
) -> tuple[Errors, Errors] | None:
    """Returns the errors of both; None if the reference is not finite, or if a site is missing."""
    truth = reference.trace(inputs, FLOAT64)
    require_float64(truth, reference.name)
    truths = {site: Truth(truth[site]) for site in first.reference}
    own = errors_of(reference.trace(inputs, first.precision), truths, carriers=True)
    theirs = errors_of(candidate.trace(inputs, first.precision), truths)
    if len(own) < len(truths) or not theirs.keys() >= first.candidate.keys():
        return None
    if not all(math.isfinite(error.rms) for error in own.values()):
        return None
    where = {site: f"{error.reason} on nearby inputs" for site, error in theirs.items() if error.reason}
    return own, {site: error._replace(reason=where.get(site, "")) for site, error in theirs.items()}
