"""Runs a reference again with a change, and predicts what a candidate with the same change shows at a site."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.compare.inputs import Inputs
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.diagnose.orders import interleave, reorder_elements, reorder_weight
from vit_ref.verify.diagnose.predictions import Prediction
from vit_ref.verify.diagnose.relations import change
from vit_ref.verify.pairs.rotary import find_tables, turn
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.rounding import STORED

# So many values before a wrong one are tried.
BEFORE = 12
# Values with more elements are not explained.
LARGEST = 1 << 24
# The reference runs so often with a change of a hidden value, of attention, of a value that the candidate shows, and
# of weights.
_HIDDEN_RUNS, _HEAD_RUNS, _SHOWN_RUNS, _WEIGHT_RUNS = 200, 100, 60, 60
# So many values that the candidate does not show, one after another, are rounded together.
_TOGETHER = 4
# So many shown values right before the wrong one may have been used in another order: query, key and value.
_SHOWN = 3
_QUERIES = ("query", "q_proj", "q_lin", "to_q")
_KEYS = ("key", "k_proj", "k_lin", "to_k")


class Reruns(NamedTuple):
    """The values that a site shows if the reference runs with a change. Each method yields those of one kind of change.

    Attributes:
      reference: the reference, observed at all of its sites.
      inputs: the inputs of the comparison.
      order: all sites in the order of the pass.
      site: the site whose value is wanted.
      known: the reference's values.
      parameters: the reference's parameters.
      before: returns the values before a site, the nearest first.
    """

    reference: Any
    inputs: Inputs
    order: list[str]
    site: str
    known: Trace
    parameters: Mapping[str, NDArray]
    before: Callable[[str], Mapping[str, NDArray]]

    def with_rounded(self, shown: Collection[str]) -> Iterator[Prediction]:
        """Rounds values together that the candidate does not show, one after another.

        The cosines and the sines of rotary positions are such values, in tables that are far from their use.

        Args:
          shown: the sites that the candidate shows.
        """
        earlier = self.order[: self.order.index(self.site)]
        gaps = [list(names) for seen, names in itertools.groupby(earlier, shown.__contains__) if not seen]
        # A single value right before the site is tried with all other changes.
        few = [gap for gap in reversed(gaps) if len(gap) <= _TOGETHER and gap != earlier[-1:]]
        for gap in [gap for gap in few if self.known.keys() >= set(gap)][:BEFORE]:
            for name, rounded in STORED.items():
                fed = {site: rounded(self.known[site]) for site in gap}
                yield Prediction(f"at {', '.join(gap)}, rounded to {name}", self._run(fed), name)

    def with_hidden(self, hidden: tuple[str, ...]) -> Iterator[Prediction]:
        """Changes a value that the candidate does not show, right before the site.

        Args:
          hidden: the sites of these values.
        """
        runs = 0
        for name in reversed([name for name in hidden if name in self.known][-BEFORE:]):
            for label, value, rounded_to in self._ways(name):
                if runs == _HIDDEN_RUNS:
                    return
                runs += 1
                yield Prediction(f"at {name}, {label}", self._run({name: value}), rounded_to)

    def with_shown(self, shown: tuple[str, ...]) -> Iterator[Prediction]:
        """Changes the order of a right value that is used for the wrong one.

        Args:
          shown: the sites before the wrong one that the candidate shows.
        """
        ways = (
            (name, label, value)
            for name in reversed(shown[-_SHOWN:])
            if name in self.known and self.known[name].size <= LARGEST
            for label, value, _ in reorder_elements(self.known[name])
        )
        for name, label, value in itertools.islice(ways, _SHOWN_RUNS):
            yield Prediction(f"{name} used in another order: {label}", self._run({name: value}))

    def with_weights(self, modules: tuple[str, ...]) -> Iterator[Prediction]:
        """Changes a weight of a submodule: its order, or the weights of another submodule in their place.

        Args:
          modules: the submodules whose weights may be wrong.
        """
        if not hasattr(self.reference, "with_parameters"):
            return
        for label, changed in itertools.islice(self._changed_weights(modules), _WEIGHT_RUNS):
            yield Prediction(label, self._run({}, changed))

    def with_heads(self) -> Iterator[Prediction]:
        """Changes attention between a query with its key and the site: its scale, rotary positions, shared heads."""
        ways = (
            prediction
            for query, key in self._rotated()
            for changes in (
                self._with_scaled_scores(query),
                self._with_other_pairs(query, key),
                self._with_turned_prefix(query, key),
                self._with_tiled_keys(query, key),
            )
            for prediction in changes
        )
        yield from itertools.islice(ways, _HEAD_RUNS)

    def _with_scaled_scores(self, query: str) -> Iterator[Prediction]:
        """Multiplies the scores by the factors that lie between the scales of heads, of the whole width, and none."""
        width = self.known[query].shape[-1]
        for number in [number for number in range(2, width + 1) if width % number == 0][:BEFORE]:
            for text, factor in (("1 / sqrt({})", number**-0.5), ("sqrt({})", number**0.5), ("1 / {}", 1 / number)):
                label = f"the scores of attention multiplied by {factor:.6g}, which is {text.format(number)}"
                yield Prediction(label, self._run({query: factor * self.known[query]}))

    def _with_other_pairs(self, query: str, key: str) -> Iterator[Prediction]:
        for size in _heads(self.known[query], self.known[key]):
            for back in (False, True):
                fed = {name: interleave(self.known[name], size, back=back) for name in (query, key)}
                pairs, other = ("halves", "adjacent channels") if back else ("adjacent channels", "halves")
                label = f"rotary positions turn {pairs} of every {size} channels for {other}"
                yield Prediction(label, self._run(fed))

    def _with_turned_prefix(self, query: str, key: str) -> Iterator[Prediction]:
        """Turns tokens that stand before those that have rotary positions."""
        tables = find_tables([self.known[name] for name in self._near(query)])
        if tables is None or self.known[query].ndim != 3:
            return
        start = self.known[query].shape[1] - len(tables.cos)
        for number in range(1, min(start, len(tables.cos), BEFORE) + 1):
            for halves in (True, False):
                places = slice(start - number, start)
                fed = {name: turn(self.known[name], tables, places, halves=halves) for name in (query, key)}
                label = f"rotary positions turn the {number} tokens before those that have them, as the first of these"
                yield Prediction(label, self._run(fed))

    def _with_tiled_keys(self, query: str, key: str) -> Iterator[Prediction]:
        """Gives each query head another head of keys and values than its own, if several share one."""
        weight = self.parameters.get(f"{self.site}.weight")
        width, keys = self.known[query].shape[-1], self.known[key].shape[-1]
        if weight is None or not hasattr(self.reference, "with_parameters") or weight.shape[1:] != (width,):
            return
        if not 0 < keys < width or width % keys:
            return
        sizes = [size for size in range(1, keys) if keys % size == width % size == 0]
        for size in sizes[-BEFORE:]:
            of_keys, shared = keys // size, width // keys
            # Head n of the candidate's queries meets the keys that the reference gives this head.
            heads = np.arange(of_keys * shared)
            places = np.argsort(heads % of_keys * shared + heads // of_keys)
            channels = (places[:, None] * size + np.arange(size)).ravel()
            fed = {query: self.known[query][..., channels]}
            label = f"query head n gets head n % {of_keys} of keys and values, not n // {shared}"
            yield Prediction(label, self._run(fed, {f"{self.site}.weight": weight[:, channels]}))

    def _changed_weights(self, modules: tuple[str, ...]) -> Iterator[tuple[str, dict[str, NDArray]]]:
        own = _by_module(self.parameters)
        # Of an attention submodule the site is a layer, but it may hold weights itself.
        inside = {".".join(module.split(".")[:k]) for module in modules for k in range(module.count(".") + 2)}
        widths = {value.shape[axis] for value in self.before(self.site).values() for axis in (1, -1) if value.ndim > 1}
        for module in own:
            for end, weight in own[module].items() if module in inside else ():
                for label, changed, _ in reorder_weight(weight, widths) if weight.size <= LARGEST else ():
                    name = f"{module}.{end}".lstrip(".")
                    yield f"{name} {label}", {name: changed}
        for module in modules:
            weights = own.get(module, {})
            shapes = {end: weight.shape for end, weight in weights.items()}
            for other, theirs in own.items() if weights else ():
                if other == module or {end: weight.shape for end, weight in theirs.items()} != shapes:
                    continue
                ends = [tuple(weights), *((end,) for end in weights if len(weights) > 1)]
                for some in ends:
                    what = "the parameters" if len(some) == len(weights) else f"the {some[0]}"
                    yield (
                        f"{what} of {other} in place of {module}'s",
                        {f"{module}.{end}": theirs[end] for end in some},
                    )

    def _ways(self, name: str) -> Iterator[Prediction]:
        truth = self.known[name]
        if truth.size > LARGEST:
            return
        yield from change(truth, self.before(name))
        for form, rounded in STORED.items():
            yield Prediction(f"rounded to {form}", rounded(truth), format=form)
        yield Prediction("nothing", np.zeros_like(truth))
        yield Prediction("the sign turned", -truth)

    def _near(self, site: str) -> list[str]:
        return [name for name in self.order[: self.order.index(site)] if name in self.known]

    def _rotated(self) -> Iterator[tuple[str, str]]:
        """Yields the sites of queries and keys near before the site."""
        near = self._near(self.site)[-2 * BEFORE :]
        for query in near:
            for ending, other in zip(_QUERIES, _KEYS, strict=True):
                if query.endswith(ending) and (key := query[: -len(ending)] + other) in near:
                    yield query, key

    def _run(self, fed: dict[str, NDArray], parameters: dict[str, NDArray] | None = None) -> NDArray:
        """Returns the site's value with other values, and with other parameters, in place of the reference's."""
        changed = self.reference.with_parameters(parameters) if parameters else self.reference
        return np.asarray(changed.trace(self.inputs, FLOAT64, replace=fed)[self.site])


def _by_module(parameters: Mapping[str, NDArray]) -> dict[str, dict[str, NDArray]]:
    """Returns the parameters that each submodule holds itself, by the ends of their names."""
    own: dict[str, dict[str, NDArray]] = {}
    for name, weight in parameters.items():
        module, _, end = name.rpartition(".")
        own.setdefault(module, {})[end] = weight
    return own


def _heads(query: NDArray, key: NDArray) -> list[int]:
    """Returns the sizes that a head may have: even numbers that divide both widths."""
    widths = query.shape[-1], key.shape[-1]
    return [size for size in range(4, min(widths) + 1, 2) if not any(width % size for width in widths)][:12]
