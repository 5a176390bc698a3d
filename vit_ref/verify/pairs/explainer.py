"""Explains divergences from a declared reference. Its formulas are not known, but it can be run with a change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.compare.inputs import Inputs, is_float
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.diagnose.divergence import Divergence
from vit_ref.verify.diagnose.predictions import Prediction, explain_by_order
from vit_ref.verify.diagnose.relations import change, explain_by_relation, interleave, reorder
from vit_ref.verify.formats import STORED
from vit_ref.verify.gates import error
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.problem import hidden_before
from vit_ref.verify.results import Cause, Explanation

# So many values before a wrong one are tried, and the reference runs so often with a change.
_BEFORE, _RUNS = 12, 250
# So many values that the candidate does not show, one after another, are rounded together.
_TOGETHER = 4
# Values with more elements are not explained.
_LARGEST = 1 << 24
_QUERIES = ("query", "q_proj", "q_lin")
_KEYS = ("key", "k_proj", "k_lin")


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
            return Explanation((), f"as its shape is {found.value.shape}, not {found.truth.shape}")
        if not found.comparable:
            return Explanation((), "as it is not finite")
        if found.value.size > _LARGEST:
            return Explanation()
        known = self._reference.trace(self._inputs, FLOAT64)
        parameters = self._reference.parameters()
        before = self._before(site, known)
        causes = found.causes(
            change(found.truth, before),
            explain_by_relation(found.truth, found.value, before, parameters),
            explain_by_order(found.truth, found.value, _axes(found.truth)),
            found.by_value(),
        )
        if causes:
            return Explanation(causes)
        hidden = hidden_before(site, self._order, shown)
        weighted = self._weighted(found, parameters, (site, *hidden[-_BEFORE:]))
        stored = self._rounded(found, known, shown)
        return Explanation(found.causes(stored, weighted, self._within(found, known, hidden)))

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
        if not found.comparable or value.size > _LARGEST:
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
            if len(found) == _BEFORE:
                break
        given = self._inputs.items() if isinstance(self._inputs, Mapping) else ()
        return found | {name: value.astype(np.float64) for name, value in given if is_float(value)}

    def _rounded(self, found: Divergence, known: Trace, shown: Trace) -> Iterator[Prediction]:
        """Yields the reference's values at the site if values that the candidate does not show are rounded together.

        The cosines and the sines of rotary positions are such values, in tables that are far from their use.
        """
        earlier = self._order[: self._order.index(found.site)]
        gaps = [list(names) for seen, names in itertools.groupby(earlier, shown.__contains__) if not seen]
        # A single value right before the site is tried with all other changes.
        few = [gap for gap in reversed(gaps) if len(gap) <= _TOGETHER and gap != earlier[-1:]]
        for gap in [gap for gap in few if known.keys() >= set(gap)][:_BEFORE]:
            for name, rounded in STORED.items():
                fed = {site: rounded(known[site]) for site in gap}
                yield Prediction(f"at {', '.join(gap)}, rounded to {name}", self._run(fed, found.site), name)

    def _within(self, found: Divergence, known: Trace, hidden: tuple[str, ...]) -> Iterator[Prediction]:
        """Yields the reference's values at the site after a change at a hidden site right before it."""
        runs = 0
        for name in reversed([name for name in hidden if name in known][-_BEFORE:]):
            before = self._before(name, known)
            for label, value, rounded_to in self._ways(known[name], before):
                if runs == _RUNS:
                    return
                runs += 1
                yield Prediction(f"at {name}, {label}", self._run({name: value}, found.site), rounded_to)
        for query, key in self._rotated(found.site, known):
            for size in _heads(known[query], known[key]):
                for back in (False, True):
                    fed = {name: interleave(known[name], size, back=back) for name in (query, key)}
                    pairs = "adjacent channels" if not back else "halves"
                    other = "halves" if not back else "adjacent channels"
                    yield Prediction(
                        f"rotary positions turn {pairs} of every {size} channels for {other}",
                        self._run(fed, found.site),
                    )

    def _weighted(
        self, found: Divergence, parameters: Mapping[str, NDArray], modules: tuple[str, ...]
    ) -> Iterator[Prediction]:
        """Yields the reference's values at the site after a change of a weight that its submodules hold."""
        if not hasattr(self._reference, "with_parameters"):
            return
        for name, weight in parameters.items():
            if name.rpartition(".")[0] in modules and weight.size <= _LARGEST:
                for label, changed, _ in reorder(weight):
                    run = self._reference.with_parameters({name: changed}).trace(self._inputs, FLOAT64)
                    yield Prediction(f"{name} {label}", np.asarray(run[found.site]))

    def _ways(self, truth: NDArray, before: Mapping[str, NDArray]) -> Iterator[Prediction]:
        if truth.size > _LARGEST:
            return
        yield from change(truth, before)
        for name, rounded in STORED.items():
            yield Prediction(f"rounded to {name}", rounded(truth), format=name)
        yield Prediction("nothing", np.zeros_like(truth))
        yield Prediction("the sign turned", -truth)

    def _rotated(self, site: str, known: Trace) -> Iterator[tuple[str, str]]:
        place = self._order.index(site)
        near = [name for name in self._order[max(0, place - 2 * _BEFORE) : place] if name in known]
        for query in near:
            for ending, other in zip(_QUERIES, _KEYS, strict=True):
                if query.endswith(ending) and (key := query[: -len(ending)] + other) in near:
                    yield query, key

    def _run(self, fed: dict[str, NDArray], site: str) -> NDArray:
        return np.asarray(self._reference.trace(self._inputs, FLOAT64, replace=fed)[site])


def _axes(value: NDArray) -> tuple[str, ...]:
    """Returns the name of one index along each axis."""
    return tuple("last" if axis == value.ndim - 1 else f"number {axis}" for axis in range(value.ndim))


def _heads(query: NDArray, key: NDArray) -> list[int]:
    """Returns the sizes that a head may have: even numbers that divide both widths."""
    widths = query.shape[-1], key.shape[-1]
    return [size for size in range(4, min(widths) + 1, 2) if not any(width % size for width in widths)][:12]
