"""Matches a candidate's values to this package's, by the values themselves and not by names.

All blocks are matched together. A key of the candidate stands for a site if its values agree in all blocks, or in the
blocks before the first divergence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.verify.proposals.readings import SAMPLE, Place, Reading, Readings, Shape, patterns

# In float64 two right implementations are within 1e-12 of each other (see `gates`), and a wrong formula is 5e-7 away.
EQUAL = 1e-9
# A value is close if it is nearer than this, and ten times nearer than any other. Tanh GELU is well below it.
CLOSE, CLEARLY = 0.1, 10


class Match(NamedTuple):
    """The candidate's value that stands for a site or a parameter.

    Attributes:
      target: name of the site or parameter, with `{i}` for all blocks.
      reading: the chosen value.
      errors: relative RMS error by block.
      also: keys that show the same value.
      by_place: whether it was matched by the parameters of the layer, and not by its value.
      instead: (block, key) pairs of another key that is equal where the chosen one is not.
    """

    target: str
    reading: Reading
    errors: tuple[float, ...]
    also: tuple[str, ...] = ()
    by_place: bool = False
    instead: tuple[tuple[int, str], ...] = ()


class Search:
    """The search for targets among the values that a candidate shows.

    Args:
      shown: the candidate's values by key, in the order of the run.
      targets: the values to look for, by name.
      config: the model's configuration.
      parameters: whether these are parameters. Two parameters with the same value, such as zeros, are still two.
    """

    def __init__(
        self,
        shown: Mapping[str, NDArray],
        targets: Mapping[str, NDArray],
        config: ViTConfig,
        *,
        parameters: bool = False,
    ):
        self.matches: dict[str, Match] = {}
        # Parameters whose value several of the candidate's parameters have.
        self.ambiguous: dict[str, tuple[str, ...]] = {}
        self._shown = shown
        self._parameters = parameters
        self._patterns = patterns(shown, config.num_hidden_layers)
        self._groups: dict[str, list[str]] = {}
        for name in targets:
            self._groups.setdefault(re.sub(r"^(blocks?)\.\d+\.", r"\1.{i}.", name), []).append(name)
        self._shapes = {name: value.shape for name, value in targets.items()}
        self._readings = {shape: Readings(shown, shape, config, parameters) for shape in set(self._shapes.values())}
        self._truth = {
            name: value.reshape(-1)[self._readings[value.shape].positions] for name, value in targets.items()
        }
        self._truths = {
            shape: np.stack([truth for name, truth in self._truth.items() if self._shapes[name] == shape])
            for shape in self._readings
        }

    def run(self, owners: Callable[[str], Collection[Place]], *, guess: bool = False) -> None:
        """Looks for targets that have no match yet.

        Args:
          owners: returns the keys at which a target should be, as far as they are known.
          guess: whether to accept unequal values: those at the target's own key, or else close ones.
        """
        for template, names in self._groups.items():
            if not any(name in self.matches for name in (template, *names)) and "{i}" in template:
                self._find(template, names, owners(template), guess)
            if template not in self.matches and template not in self.ambiguous:
                for name in names:
                    if name not in self.matches:
                        self._find(name, [name], owners(name), guess)

    @property
    def unmatched(self) -> list[str]:
        """Targets without a match, with `{i}` if no block has one."""
        missing: list[str] = []
        for template, names in self._groups.items():
            left = [name for name in names if not {name, template} & self.matches.keys()]
            missing += [template] if left == names else left
        return missing

    def _find(
        self,
        target: str,
        names: Sequence[str],
        owners: Collection[Place],
        guess: bool,
    ) -> None:
        used = {
            (key, match.reading.part)
            for match in (self.matches.values() if self._parameters else ())
            for key in (match.reading.key, *self._expanded(match.reading.key))
        }
        shape = self._shapes[names[0]]
        pool = self._readings[shape]
        readings = [
            each for each in (pool.blocked if "{i}" in target else pool.single) if (each.key, each.part) not in used
        ]
        if not readings:
            return
        truth = np.stack([self._truth[name] for name in names])
        values = _values(readings)
        off = _relative(values, truth)
        equal = (off <= EQUAL).sum(axis=-1)
        owned = [k for k, reading in enumerate(readings) if (reading.place, reading.part) in owners]
        by_place = False
        if equal.any():
            tied = [int(k) for k in np.flatnonzero(equal == equal.max())]
            if self._parameters:
                at_home = [k for k in tied if k in owned]
                tied = at_home or tied
                self.ambiguous.pop(target, None)
                # It equals several, or equals another target too. Then the one that remains need not be the right one.
                shared = not at_home and _count(truth[0], self._truths[shape]) > _count(truth[0], truth)
                if shared or len({(readings[k].key, readings[k].part) for k in tied}) > 1:
                    self.ambiguous[target] = tuple(dict.fromkeys(readings[k].key for k in tied))
                    return
            winner = tied[0]
        elif guess and len({readings[k].key for k in owned}) == 1:
            winner, by_place = min(owned, key=lambda k: off[k, 0]), True
        elif guess and target in self._groups and not self._parameters:
            off[self._taken(target, values)] = np.inf
            winner = int(off[:, 0].argmin())
            if not self._is_clear(values[:, 0], off[:, 0], names[0]):
                return
        else:
            return
        equal = (_relative(values, values[winner]) <= EQUAL).all(axis=-1) if not self._parameters else ()
        # The winner is added because a value that is not finite equals nothing, not even itself.
        same = sorted({winner, *(int(k) for k in np.flatnonzero(equal))})
        chosen = readings[same[0]]
        also = dict.fromkeys(readings[k].key for k in same if readings[k].key != chosen.key)
        errors = tuple(float(error) for error in off[same[0]])
        self.matches[target] = Match(target, chosen, errors, tuple(also), by_place, self._instead(names, errors))

    def _taken(self, target: str, values: NDArray) -> NDArray:
        """Returns which readings show another target: they equal it in any block, or were chosen for it."""
        shape = self._shape(target)
        taken = np.zeros(len(values), bool)
        for truth in self._truths[shape]:
            taken |= (_relative(values, truth) <= EQUAL).any(axis=-1)
        for match in self.matches.values():
            if self._shape(match.target) == shape:
                equal = _relative(values, match.reading.values) <= EQUAL
                taken |= equal.all(axis=-1) if "{i}" in target else equal.any(axis=-1)
        return taken

    def _is_clear(self, values: NDArray, off: NDArray, name: str) -> bool:
        """Returns whether the nearest value is close, no other is nearly as close, and no other target is closer."""
        nearest = values[off.argmin()]
        rivals = off[_relative(values, nearest) > EQUAL]
        targets = self._truths[self._shapes[name]]
        its_nearest = targets[np.linalg.norm(targets - nearest, axis=-1).argmin()]
        return bool(
            off.min() <= CLOSE
            and off.min() * CLEARLY <= rivals.min(initial=np.inf)
            and np.array_equal(its_nearest, self._truth[name])
        )

    def _instead(self, names: Sequence[str], errors: Sequence[float]) -> tuple[tuple[int, str], ...]:
        better: list[tuple[int, str]] = []
        for i, (name, error) in enumerate(zip(names, errors, strict=True)):
            pool = self._readings[self._shapes[name]].single if error > EQUAL else []
            equal = np.flatnonzero(_relative(_values(pool), self._truth[name]) <= EQUAL)
            better += [(i, pool[k].key) for k in equal[:1]]
        return tuple(better)

    @property
    def leftover(self) -> list[str]:
        """Keys that match nothing. For sites, keys whose value equals that of a matched key are left out."""
        known = {name for match in self.matches.values() for name in self._expanded(match.reading.key)}
        for shape, pool in self._readings.items() if not self._parameters else ():
            readings = pool.single
            values = _values(readings)[:, 0]
            chosen = [reading.values for reading in readings if reading.key in known]
            for value in np.concatenate([self._truths[shape], *chosen]):
                equal = _relative(values, value) <= EQUAL
                known |= {readings[k].key for k in np.flatnonzero(equal)}
        pattern_of = {
            key: pattern for pattern, keys in self._patterns.items() for key in keys if known.isdisjoint(keys)
        }
        return list(dict.fromkeys(pattern_of.get(key, key) for key in self._shown if key not in known))

    def _shape(self, target: str) -> Shape:
        return self._shapes[self._groups.get(target, [target])[0]]

    def _expanded(self, key: str) -> Sequence[str]:
        return self._patterns.get(key, [key])


def _values(readings: Sequence[Reading]) -> NDArray:
    """Returns the values as one array (readings, blocks or 1, SAMPLE)."""
    return np.stack([reading.values for reading in readings]) if readings else np.zeros((0, 1, SAMPLE))


def _count(value: NDArray, among: NDArray) -> int:
    return int((among == value).all(axis=-1).sum())


def _relative(values: NDArray, truth: NDArray) -> NDArray:
    """Returns the relative RMS error over the last axis. It is infinite for values that are not finite."""
    with np.errstate(all="ignore"):
        off = np.linalg.norm(values - truth, axis=-1) / np.maximum(np.linalg.norm(truth, axis=-1), np.finfo(float).tiny)
    return np.nan_to_num(off, nan=np.inf)
