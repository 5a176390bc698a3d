"""Does the explainer of a declared reference stop where nothing can be explained, or where it would take too long?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.diagnose.predictions import explain_by_order
from vit_ref.verify.pairs import explainer
from vit_ref.verify.pairs.explainer import PairExplainer

X = np.random.default_rng(0).normal(size=(2, 3, 4))
ORDER = ["fc1", "act", "output"]


class Squaring:
    """Stand-in for a reference: each site is the square of the one before."""

    def __init__(self) -> None:
        self.runs = 0

    def parameters(self) -> dict[str, NDArray]:
        return {}

    def trace(self, inputs: Any, precision: Any, replace: Mapping[str, NDArray] | None = None) -> dict[str, NDArray]:
        self.runs += 1
        found, value = {}, X
        for site in ORDER:
            value = (replace or {}).get(site, value)
            found[site] = value
            value = value**2
        return found


def explained(value: NDArray, reference: Squaring | None = None) -> Any:
    truth = Squaring().trace({}, None)
    return PairExplainer(reference or Squaring(), {"x": X}, ORDER).explain_formula("output", {"output": value}, truth)


def test_a_value_that_can_be_explained_is() -> None:
    assert explained((2 * X) ** 4).causes[0].label == "16 x the reference"


def test_a_value_that_is_not_finite_is_not_explained() -> None:
    found = explained(np.full_like(X, np.nan))
    assert found.causes == () and found.place == "as it is not finite"


def test_a_value_that_is_too_large_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    half, truth = 0.5 * X**4, X**4
    one = PairExplainer(Squaring(), {"x": X}, ORDER)
    assert explained(half).causes and one.explain_gradient("fc1", half, truth).causes
    monkeypatch.setattr(explainer, "_LARGEST", X.size - 1)
    assert not explained(half).causes
    assert not one.explain_gradient("fc1", half, truth).causes


def test_no_change_is_tried_at_a_hidden_value_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Squaring()
    one = PairExplainer(reference, {"x": X}, ORDER)
    monkeypatch.setattr(explainer, "_LARGEST", X.size - 1)
    assert list(one._ways(X, {"x": X})) == []


def test_the_reference_runs_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = np.sin(X)
    free, bounded = Squaring(), Squaring()
    explained(wrong, free)
    monkeypatch.setattr(explainer, "_RUNS", 3)
    explained(wrong, bounded)
    assert bounded.runs == 1 + 3 < free.runs


def test_an_axis_too_long_for_distances_has_no_other_order() -> None:
    long = np.arange(8193.0)[None]
    assert list(explain_by_order(long, long[:, ::-1], ("row", "class"))) == []
    short = long[:, :8192]
    assert [each.label for each in explain_by_order(short, short[:, ::-1], ("row", "class"))] != []
