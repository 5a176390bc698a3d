"""Does a proposal look past a wrong value only if later values prove what it stands for?"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.pairs import onward
from vit_ref.verify.pairs.onward import Observed, look_past

RNG = np.random.default_rng(0)
X, FIRST, SECOND, THIRD = RNG.normal(size=(4, 6, 6))


class Runs:
    """Two layers with an activation after each, and a last layer. Runs are counted.

    Args:
      wanted: the sites that the reference has.
      wrong: the factors of the candidate's first and second layer.
    """

    def __init__(self, *wanted: str, wrong: tuple[float, float] = (2.0, 1.0)):
        self.number, self._wrong = 0, wrong
        every = self._run({}, (1.0, 1.0))
        self.wanted = {site: every[site] for site in wanted}

    def _run(self, fed: dict[str, NDArray], factors: tuple[float, float]) -> dict[str, NDArray]:
        shown: dict[str, NDArray] = {}

        def tap(name: str, value: NDArray) -> NDArray:
            shown[name] = fed.get(name, value)
            return shown[name]

        first = np.maximum(tap("first", factors[0] * X @ FIRST), 0)
        second = np.maximum(tap("second", factors[1] * tap("first.act", first) @ SECOND), 0)
        tap("last", tap("second.act", second) @ THIRD)
        return shown

    def __call__(self, fed: dict[str, NDArray]) -> Observed:
        self.number += 1
        shown = self._run(fed, self._wrong)
        matches = {
            site: found
            for site, truth in self.wanted.items()
            if (found := {key: "" for key, value in shown.items() if np.allclose(value, truth, rtol=1e-9, atol=0)})
        }
        right = np.allclose(shown["last"], self._run({}, (1.0, 1.0))["last"], rtol=1e-9, atol=0)
        return Observed(shown, matches, right)


def test_a_right_candidate_runs_once() -> None:
    runs = Runs("first", "second", "last", wrong=(1.0, 1.0))
    seen, different = look_past(runs, {**runs.wanted, "hidden": RNG.normal(size=(6, 6))})
    assert runs.number == 1 and different == frozenset() and seen.matches.keys() == runs.wanted.keys()


def test_a_wrong_value_is_taken_for_the_site_after_which_all_is_equal() -> None:
    runs = Runs("first", "first.act", "second", "second.act", "last")
    seen, different = look_past(runs, runs.wanted)
    assert different == {"first"} and seen.matches.keys() == runs.wanted.keys()


def test_one_equal_value_proves_nothing() -> None:
    # Given the value of `second`, `first` is followed by the value of `second.act`.
    runs = Runs("second", "second.act")
    assert runs({"first": runs.wanted["second"]}).matches["second.act"] == {"first.act": ""}
    assert "first" not in look_past(runs, runs.wanted)[1]


def test_what_was_equal_has_to_stay_equal() -> None:
    wanted = {site: RNG.normal(size=3) for site in "abcd"}
    seen, then = (Observed({}, {site: {} for site in sites}, False) for sites in ("a", "bc"))
    assert not onward._proves(seen, then, wanted, "d")
    assert onward._proves(seen, then._replace(matches=then.matches | seen.matches), wanted, "d")


def test_a_value_that_nothing_follows_is_not_guessed() -> None:
    runs = Runs("last")
    assert look_past(runs, runs.wanted)[1] == frozenset()


def test_the_candidate_runs_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Runs("second", "second.act", "last")
    free.wanted = {name: RNG.normal(size=value.shape) for name, value in free.wanted.items()}
    look_past(free, free.wanted)
    monkeypatch.setattr(onward, "_RUNS", 3)
    bounded = Runs("last")
    bounded.wanted = free.wanted
    look_past(bounded, bounded.wanted)
    assert bounded.number == 1 + 3 < free.number


def test_the_runs_of_all_divergences_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onward, "_PROOF", 1)
    numbers = []
    for most in (1, 2):
        monkeypatch.setattr(onward, "_RUNS", most)
        runs = Runs("first", "first.act", "second", "second.act", "last", wrong=(2.0, 3.0))
        numbers.append((look_past(runs, runs.wanted)[1], runs.number))
    assert numbers == [({"first"}, 2), ({"first", "second"}, 3)]


def test_a_value_that_equals_its_own_site_is_not_marked_as_different() -> None:
    # The rotated query has the norm of the query.
    runs = Runs("first", "second", "last")

    def observe(fed: dict[str, NDArray]) -> Observed:
        seen = runs(fed)
        turned = -runs.wanted["first"]
        return seen._replace(shown={"turned": turned, **seen.shown}, matches={"turned": {"turned": ""}, **seen.matches})

    _, different = look_past(observe, {"turned": -runs.wanted["first"], **runs.wanted})
    assert "first" in different and "turned" not in different
