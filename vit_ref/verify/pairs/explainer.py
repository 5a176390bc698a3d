"""Explains divergences from a declared reference. Its formulas are not known, but it can be run with a change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.compare.inputs import Inputs, is_float
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.diagnose.divergence import Divergence
from vit_ref.verify.diagnose.places import find_place
from vit_ref.verify.diagnose.positions import resize_otherwise
from vit_ref.verify.diagnose.predictions import Prediction, explain_by_order
from vit_ref.verify.diagnose.relations import change, explain_by_relation
from vit_ref.verify.gates import error
from vit_ref.verify.pairs.reruns import BEFORE, LARGEST, Reruns
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.problem import hidden_before
from vit_ref.verify.results import Cause, Explanation
from vit_ref.verify.rounding import STORED

# So many changes are tried after one that fits, because another may fit better, as one epsilon of several does.
_MORE = 16


class PairExplainer:
    """An `Explainer` for a declared reference.

    Args:
      reference: the reference, observed at all of its sites.
      inputs: the inputs of the comparison.
      order: all sites in the order of the pass.
    """

    def __init__(self, reference: Any, inputs: Inputs, order: list[str]):
        self._reference, self._inputs, self._order = reference, inputs, order

    def explain_formula(self, site: str, shown: Trace, truth: Trace) -> Explanation:
        """Implements `Explainer.explain_formula`."""
        found = Divergence(site, shown[site], truth[site], made_in="reference")
        if found.value.shape != found.truth.shape:
            return Explanation((), f"because its shape is {found.value.shape}, not {found.truth.shape}")
        if not found.comparable:
            return Explanation((), "because it is not finite")
        if found.value.size > LARGEST:
            return Explanation()
        known = self._reference.trace(self._inputs, FLOAT64)
        parameters = self._reference.parameters()
        before = self._before(site, known)
        causes = found.causes(
            change(found.truth, before),
            explain_by_relation(found.truth, found.value, before, parameters),
            explain_by_order(found.truth, found.value, _axes(found.truth)),
            found.by_value(),
            self._from_later(found, known),
            resize_otherwise(found.truth, before, parameters),
        )
        for changes in self._reruns(found, known, parameters, shown) if not causes else ():
            if causes := _first_causes(found, changes):
                break
        return Explanation(causes, "" if causes else find_place(found.value, found.truth))

    def explain_rounding(self, site: str, shown: Trace, truth: Trace, precision: Precision) -> tuple[Cause, ...]:
        """Implements `Explainer.explain_rounding`. It knows one cause: a coarser format than the tested one."""
        value = shown[site]
        for name, rounded in STORED.items():
            if name not in ("float32", value.dtype.name) and np.array_equal(rounded(value), value):
                return (Cause(f"rounded to {name}", site, error(value, truth[site]).rms, 0.0, name),)
        return ()

    def explain_gradient(self, name: str, value: NDArray, truth: NDArray) -> Explanation:
        """Implements `Explainer.explain_gradient`. It tries a factor, zeros, a rounding and another order."""
        found = Divergence(name, value, truth, made_in="reference")
        if not found.comparable or value.size > LARGEST:
            return Explanation()
        return Explanation(found.causes(found.by_value(), explain_by_order(truth, value, _axes(truth))))

    def _before(self, site: str, known: Trace) -> dict[str, NDArray]:
        """Returns the values before a site, the nearest first and each once, and then the inputs."""
        place = self._order.index(site)
        found: dict[str, NDArray] = {}
        for name in reversed(self._order[:place]):
            value = known.get(name)
            if value is None or any(
                value.shape == other.shape and np.array_equal(value, other) for other in found.values()
            ):
                continue
            found[name] = value
            if len(found) == BEFORE:
                break
        given = self._inputs.items() if isinstance(self._inputs, Mapping) else ()
        return found | {name: value.astype(np.float64) for name, value in given if is_float(value)}

    def _from_later(self, found: Divergence, known: Trace) -> Iterator[Prediction]:
        """Yields the values after the site, in whose place another one may stand, as keys in the place of queries."""
        for name in self._order[self._order.index(found.site) + 1 :]:
            value = known.get(name)
            if value is not None and value.shape == found.truth.shape and not np.array_equal(value, found.truth):
                yield Prediction(f"the value of {name} in its place", value)

    def _reruns(
        self, found: Divergence, known: Trace, parameters: Mapping[str, NDArray], shown: Trace
    ) -> Iterator[Iterator[Prediction]]:
        """Yields explanations for which the reference runs with a change, the most likely ones first."""
        hidden = hidden_before(found.site, self._order, shown)
        seen = tuple(name for name in self._order[: self._order.index(found.site)] if name in shown)
        reruns = Reruns(
            self._reference,
            self._inputs,
            self._order,
            found.site,
            known,
            parameters,
            partial(self._before, known=known),
        )
        yield reruns.with_rounded(shown)
        yield reruns.with_hidden(hidden)
        yield reruns.with_heads()
        yield reruns.with_weights((found.site, *hidden[-BEFORE:]))
        yield reruns.with_shown(seen)


def _first_causes(found: Divergence, changes: Iterator[Prediction]) -> tuple[Cause, ...]:
    """Returns the first change that fits, and those of the next few that fit as well. Each change is a whole run."""
    fitting = itertools.dropwhile(lambda prediction: not found.causes([prediction]), changes)
    return found.causes(itertools.islice(fitting, 1 + _MORE))


def _axes(value: NDArray) -> tuple[str, ...]:
    """Returns the name of one index along each axis."""
    return tuple("last" if axis == value.ndim - 1 else f"number {axis}" for axis in range(value.ndim))
