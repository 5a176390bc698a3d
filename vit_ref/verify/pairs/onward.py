"""Looks past a candidate's wrong value: gives it the reference's value there, and sees whether what follows is equal.

Without this, nothing equals a site after the first wrong formula, and a proposed table ends there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.candidates.table import fitted
from vit_ref.verify.proposals.matching import EQUAL

# The candidate runs at most so often with a value of the reference in place of its own.
_RUNS = 40
# So many values of the candidate are tried for one divergence, and so many sites for each.
_KEYS, _SITES = 8, 4
# So many different values have to be equal after a guess. One alone proves nothing but at the end: the same activation
# follows in each block.
_PROOF = 2


class Observed(NamedTuple):
    """One run of the candidate.

    Attributes:
      shown: its values by key, in the order of the pass.
      matches: for each site that some values equal, those values' keys.
      right: whether its output is equal.
    """

    shown: dict[str, NDArray]
    matches: dict[str, dict[str, str]]
    right: bool


# It runs the candidate with values in place of its own, by key.
Observe = Callable[[dict[str, NDArray]], Observed]


def look_past(observe: Observe, wanted: Mapping[str, NDArray]) -> tuple[Observed, frozenset[str]]:
    """Matches values to sites, also after wrong ones.

    A wrong value is taken for a site if the values after it are equal once the reference's value stands in its place.

    Args:
      observe: runs the candidate.
      wanted: the reference's values by site, in the order of the pass.

    Returns:
      The last run, and the keys of the values that differ from their sites.
    """
    fed: dict[str, NDArray] = {}
    seen, runs, found = observe(fed), 0, True
    equal = {key for keys in seen.matches.values() for key in keys}
    while found and not seen.right:
        found = False
        for key, site, value in itertools.islice(_guesses(seen, wanted, fed), _RUNS - runs):
            runs += 1
            then = observe({**fed, key: value})
            if found := _proves(seen, then, wanted, site):
                fed[key], seen = value, then
                break
    # A container that returns a replaced value differs, too.
    sizes = [size_of(value) for value in fed.values()]

    def replaced(value: NDArray) -> bool:
        size = size_of(value)
        return any(math.isclose(size, other, rel_tol=EQUAL) for other in sizes)

    return seen, frozenset(key for key, value in seen.shown.items() if key not in equal and replaced(value))


def _guesses(
    seen: Observed, wanted: Mapping[str, NDArray], fed: Mapping[str, NDArray]
) -> Iterator[tuple[str, str, NDArray]]:
    """Yields values that equal no site, with a site that each may stand for, and that site's value in its shape."""
    place = {site: k for k, site in enumerate(wanted)}
    equal: dict[str, list[int]] = {}
    for site, found in seen.matches.items():
        for key in found:
            equal.setdefault(key, []).append(place[site])
    last, keys = -1, 0
    sizes: set[float] = set()
    for key, value in seen.shown.items():
        size = size_of(value)
        # An output of a submodule, or the first argument of one that no submodule returned.
        new = ":" not in key or (key.endswith(":input") and size not in sizes)
        sizes.add(size)
        if key in equal:
            last = max(last, min(equal[key]))
        elif new and key not in fed and keys < _KEYS:
            keys += 1
            left = [site for site in wanted if site not in seen.matches and place[site] > last]
            fitting = ((site, _in_shape(wanted[site], value)) for site in left)
            for site, moved in itertools.islice(((s, m) for s, m in fitting if m is not None), _SITES):
                yield key, site, moved


def _in_shape(truth: NDArray, value: NDArray) -> NDArray | None:
    """Returns a site's value as the candidate would have it: with its axes moved, as from PyTorch's order to jax's."""
    if value.size != truth.size:
        return None
    orders = [tuple(range(value.ndim))]
    if value.ndim > 2:
        orders.append((0, value.ndim - 1, *range(1, value.ndim - 1)))
    for order in orders:
        moved = value.transpose(order)
        if fitted(moved, truth.shape).shape == truth.shape:
            return truth.reshape(moved.shape).transpose(np.argsort(order))
    return None


def _proves(seen: Observed, then: Observed, wanted: Mapping[str, NDArray], site: str) -> bool:
    """Returns whether enough other values are equal since the value of a site replaced one of the candidate's."""
    # Values that only move the elements of the new one are equal to it whatever it stands for.
    moved = size_of(wanted[site])
    new = {size_of(wanted[each]) for each in then.matches.keys() - seen.matches.keys()}
    others = sum(not math.isclose(size, moved, rel_tol=EQUAL) for size in new)
    return then.matches.keys() >= seen.matches.keys() and (others >= _PROOF or (others > 0 and then.right))


def size_of(value: NDArray) -> float:
    """Returns the norm of a value."""
    return float(np.linalg.norm(value))
