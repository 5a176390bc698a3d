"""Which of a port's values is which of this package's, told by the values themselves: names mean nothing here.

Blocks are matched together: a point of the port stands for a site if it does in all blocks, or in those before the
port diverges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.verify.proposals.readings import SAMPLE, Place, Reading, Readings, Shape, patterns

# In float64 two right implementations are within 1e-12 (see `gates`), and the smallest wrong formula 5e-7 away.
EQUAL = 1e-9
# Nearer than this and ten times nearer than anything else is close: tanh GELU comes to 1e-3 at most.
CLOSE, CLEARLY = 0.1, 10


class Match(NamedTuple):
    """What stands for a site or a parameter.

    Attributes:
      target: its name, with `{i}` for all blocks.
      reading: what was chosen.
      errors: relative RMS by block.
      also: keys that show the same value.
      by_place: it was not told by its value, but by the parameters of the layer.
      instead: (block, key) where another key is equal and the chosen one is not.
    """

    target: str
    reading: Reading
    errors: tuple[float, ...]
    also: tuple[str, ...] = ()
    by_place: bool = False
    instead: tuple[tuple[int, str], ...] = ()


class Search:
    """The search for targets among the values that a port shows.

    Args:
      shown: the port's values by key, in the order in which they came.
      targets: the values looked for.
      config: the model's configuration.
      parameters: whether these are parameters, of which two with the same value, such as zeros, are two all the same.
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
        # Parameters of which several leaves have the value.
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
        """Looks for what has no match yet.

        Args:
          owners: the places where a target is to be, as far as is known.
          guess: whether unequal values count: those at the target's own place, or else close ones.
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
        """Targets without a match; `{i}` where no block has one."""
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
                # Equal to several, or as equal to another target: the one that is left over need not be it.
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
        # Also where it is not finite, and so equal to nothing.
        same = sorted({winner, *(int(k) for k in np.flatnonzero(equal))})
        chosen = readings[same[0]]
        also = dict.fromkeys(readings[k].key for k in same if readings[k].key != chosen.key)
        errors = tuple(float(error) for error in off[same[0]])
        self.matches[target] = Match(target, chosen, errors, tuple(also), by_place, self._instead(names, errors))

    def _taken(self, target: str, values: NDArray) -> NDArray:
        """Which readings are known to show something else: equal to another target in any block, or chosen for one."""
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
        """Whether the nearest value is near, no other one nearly as near, and no other target nearer to it."""
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
        found = []
        for i, (name, error) in enumerate(zip(names, errors, strict=True)):
            pool = self._readings[self._shapes[name]].single if error > EQUAL else []
            equal = np.flatnonzero(_relative(_values(pool), self._truth[name]) <= EQUAL)
            found += [(i, pool[k].key) for k in equal[:1]]
        return tuple(found)

    @property
    def leftover(self) -> list[str]:
        """Keys that stand for nothing, and of sites those whose value is not even another one's."""
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
    """(readings, blocks or 1, SAMPLE)."""
    return np.stack([reading.values for reading in readings]) if readings else np.zeros((0, 1, SAMPLE))


def _count(value: NDArray, among: NDArray) -> int:
    return int((among == value).all(axis=-1).sum())


def _relative(values: NDArray, truth: NDArray) -> NDArray:
    """Relative RMS over the last axis; what is not finite is infinitely far."""
    with np.errstate(all="ignore"):
        off = np.linalg.norm(values - truth, axis=-1) / np.maximum(np.linalg.norm(truth, axis=-1), np.finfo(float).tiny)
    return np.nan_to_num(off, nan=np.inf)
