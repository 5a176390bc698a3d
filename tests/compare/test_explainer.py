"""Does the explainer of a declared reference stop where nothing can be explained, or where it would take too long?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

import vit_ref
from vit_ref.verify.diagnose.predictions import explain_by_order
from vit_ref.verify.pairs import explainer, reruns
from vit_ref.verify.pairs.explainer import PairExplainer
from vit_ref.verify.pairs.reruns import Reruns
from vit_ref.verify.rounding import STORED

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
    assert found.causes == () and found.place == "because it is not finite"


def test_a_value_that_is_too_large_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    half, truth = 0.5 * X**4, X**4
    one = PairExplainer(Squaring(), {"x": X}, ORDER)
    assert explained(half).causes and one.explain_gradient("fc1", half, truth).causes
    monkeypatch.setattr(explainer, "LARGEST", X.size - 1)
    assert not explained(half).causes
    assert not one.explain_gradient("fc1", half, truth).causes


def test_no_change_is_tried_at_a_hidden_value_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Squaring()
    known = reference.trace({}, None)
    changed = Reruns(reference, {}, ORDER, "output", known, {}, lambda site: {})
    assert list(changed.with_hidden(("act",))) and list(changed.with_shown(("act",)))
    monkeypatch.setattr(reruns, "LARGEST", X.size - 1)
    assert not list(changed.with_hidden(("act",))) and not list(changed.with_shown(("act",)))


def test_the_reference_runs_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = np.sin(X)
    free, bounded = Squaring(), Squaring()
    explained(wrong, free)
    monkeypatch.setattr(reruns, "_HIDDEN_RUNS", 3)
    explained(wrong, bounded)
    # Once as it is, three times with another value, and once with all hidden values in each format.
    assert bounded.runs == 1 + 3 + len(STORED) < free.runs


def test_the_reference_stops_running_soon_after_a_change_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    free, few = Squaring(), Squaring()
    rounded = np.square(STORED["bfloat16"](X**2))
    assert explained(rounded, free).causes[0].label == "at fc1, act, rounded to bfloat16"
    monkeypatch.setattr(explainer, "_MORE", 0)
    assert explained(rounded, few).causes[0].label == "at fc1, act, rounded to bfloat16"
    # Once as it is, and once with the first format.
    assert few.runs == 2 and free.runs == 1 + len(STORED)


def test_an_axis_too_long_for_distances_has_no_other_order() -> None:
    long = np.arange(8193.0)[None]
    assert list(explain_by_order(long, long[:, ::-1], ("row", "class"))) == []
    short = long[:, :8192]
    assert [each.label for each in explain_by_order(short, short[:, ::-1], ("row", "class"))] != []


WEIGHT = np.random.default_rng(1).normal(size=(16, 16)).astype("f4")


def rotating(table: Callable[[Any], Any], *, shows: bool) -> Callable[..., Any]:
    """Returns a loader of a model with rotary positions, from a table (cosines, sines) for its input."""

    def forward(w: Any, x: Any, tap: Any = lambda name, value: value) -> Any:
        cos, sin = table(x)
        if shows:
            cos, sin = tap("rope.cos", cos), tap("rope.sin", sin)
        a, b = jnp.split(tap("query", x @ w), 2, axis=-1)
        return tap("rotated", jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))

    return lambda checkpoint: (forward, WEIGHT)


def followed(x: Any) -> Any:
    """Returns the table in the dtype of the pass."""
    angles = jnp.arange(9, dtype=x.dtype)[:, None] * 100.0 ** (-jnp.arange(8, dtype=x.dtype) / 8)
    return jnp.cos(angles)[None], jnp.sin(angles)[None]


def narrow(x: Any) -> Any:
    """Returns the table computed in float32, whatever the pass computes in."""
    angles = np.arange(9, dtype=np.float32)[:, None] * np.float32(100) ** (-np.arange(8, dtype=np.float32) / 8)
    return jnp.asarray(np.cos(angles)[None]), jnp.asarray(np.sin(angles)[None])


def stored(x: Any) -> Any:
    """Returns the right table, held in float32."""
    angles = np.arange(9.0)[:, None] * 100.0 ** (-np.arange(8.0) / 8)
    return jnp.asarray(np.cos(angles)[None], jnp.float32), jnp.asarray(np.sin(angles)[None], jnp.float32)


@pytest.mark.parametrize(
    ("table", "shows", "site", "labels"),
    [
        (narrow, True, "rope.cos", ["rounded to float32"]),
        (stored, True, "rope.cos", ["rounded to float32"]),
        (stored, False, "rotated", ["at rope.cos, rope.sin, rounded to float32"]),
    ],
    ids=["computed in float32", "held in float32", "held in float32, not shown"],
)
def test_a_table_of_positions_that_ignores_the_dtype_is_named(
    table: Callable[[Any], Any], shows: bool, site: str, labels: list[str]
) -> None:
    report = vit_ref.compare(
        vit_ref.Reference(load=rotating(followed, shows=True)),
        vit_ref.Candidate(load=rotating(table, shows=shows)),
        inputs={"x": np.random.default_rng(2).normal(size=(2, 9, 16))},
        backward=False,
        fail_fast=True,
    )
    assert report.forward.semantic_failures[0].site == site
    assert [cause.label for cause in report.forward.causes] == labels


class Rotated:
    """A reference whose site shows its queries, as they were fed."""

    def trace(self, inputs: Any, precision: Any, replace: Mapping[str, NDArray]) -> dict[str, NDArray]:
        return {"out": replace["q_proj"]}


def test_no_more_tokens_are_turned_than_there_are_angles() -> None:
    angles = np.arange(8.0).reshape(2, 4)
    empty, values = np.zeros((2, 0, 4)), np.random.default_rng(0).normal(size=(2, 7, 8))
    known = {"cos": np.cos(angles), "sin": np.sin(angles), "empty": empty, "none": empty}
    known |= {"q_proj": values, "k_proj": values, "out": values}
    changes = Reruns(Rotated(), {}, list(known), "out", known, {}, lambda site: {})
    labels = {each.label for each in changes.with_heads() if "tokens before" in each.label}
    assert {label.split()[4] for label in labels} == {"1", "2"}


def test_a_wrong_lone_number_is_explained() -> None:
    class Loss:
        def trace(self, inputs: Any, precision: Any, replace: Any = None) -> dict[str, NDArray]:
            return {"x": np.ones((2, 3)), "output": np.array(4.0)}

        def parameters(self) -> dict[str, NDArray]:
            return {}

    found = PairExplainer(Loss(), {}, ["x", "output"]).explain_formula(
        "output", {"x": np.ones((2, 3)), "output": np.array(6.0)}, {"output": np.array(4.0)}
    )
    assert not found.causes
