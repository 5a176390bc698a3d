"""Is a comparison refused that could prove nothing, whatever its numbers say?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_ref
from vit_ref.errors import CandidateError, InputError, PartlyJudgedError, UnjudgedError
from vit_ref.verify.candidates.running import implement
from vit_ref.verify.compare.behaviour import require_repeatable
from vit_ref.verify.pairs import session
from vit_ref.verify.pairs.discovery import Blank
from vit_ref.verify.pairs.truth import require_unchanged
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.report import summary

RNG = np.random.default_rng(0)
WEIGHTS = {"first": RNG.normal(size=(3, 5)).astype("f4"), "second": RNG.normal(size=(5, 2)).astype("f4")}


# What the reference calls. A candidate's file may replace it.
SHARED: dict[str, Any] = {}


def loader(act: Callable[[Any], Any] = jnp.tanh) -> Callable[..., Any]:
    def forward(w: Any, x: Any, tap: Any = lambda name, value: value) -> Any:
        return tap("last", act(tap("hidden", x @ w["first"])) @ w["second"])

    return lambda checkpoint: (forward, {name: value.copy() for name, value in WEIGHTS.items()})


def inputs(seed: int) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).normal(size=(4, 3))}


def compared(reference: Any, candidate: Any, **options: Any) -> Any:
    sides = vit_ref.Reference(load=reference, inputs=inputs), vit_ref.Candidate(load=candidate)
    return vit_ref.compare(*sides, **{"backward": False, **options})


def coarse(checkpoint: Any, reference: Any) -> Any:
    """The right formula, which rounds to bfloat16 below float64."""

    def forward(w: Any, x: Any) -> Any:
        hidden = x @ w["first"]
        hidden = hidden.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 else hidden
        return jnp.tanh(hidden) @ w["second"]

    return forward, reference[1]


def test_a_reference_with_other_weights_each_time_is_refused() -> None:
    """Its error in float32 is that of other weights, and allows the candidate any."""
    assert not compared(loader(), coarse).passed

    def drawn(checkpoint: Any) -> Any:
        rng = np.random.default_rng()
        return loader()(None)[0], {name: rng.normal(size=x.shape).astype("f4") for name, x in WEIGHTS.items()}

    with pytest.raises(InputError, match=r"reference: load\(\) gives other weights in float32 than in float64, first"):
        compared(drawn, coarse)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_that_are_rounded_to_the_dtype_are_the_same(precision: str) -> None:
    def rounded(checkpoint: Any, dtype: Any) -> Any:
        return loader()(None)[0], {name: jnp.asarray(value, dtype) for name, value in WEIGHTS.items()}

    assert compared(rounded, loader(), precision=precision).passed


def test_a_candidate_that_changes_the_references_parameters_is_refused() -> None:
    def scaling(checkpoint: Any, reference: Any) -> Any:
        forward, weights = reference
        weights["first"] *= 3
        return forward, dict(weights)

    with pytest.raises(InputError, match=r"candidate: it changes the reference, its parameters: copy what load\(\)"):
        compared(loader(), scaling)


def test_a_candidate_that_replaces_what_the_reference_calls_is_refused() -> None:
    shared = {"act": jnp.tanh}

    def replacing(checkpoint: Any) -> Any:
        shared["act"] = jnp.sin
        return loader(lambda x: shared["act"](x))(None)

    with pytest.raises(InputError, match="candidate: it changes the reference, its output"):
        compared(loader(lambda x: shared["act"](x)), replacing)


def test_the_reference_itself_is_no_candidate() -> None:
    with pytest.raises(InputError, match=r"candidate: load\(\) returns the reference itself"):
        compared(loader(), lambda checkpoint, reference: reference)


@pytest.mark.parametrize("act", [jnp.log, lambda x: jnp.where(x > 0, x, -jnp.inf)], ids=["NaN", "infinite"])
def test_a_reference_that_is_not_finite_is_refused(act: Any) -> None:
    """The candidate would be called wrong, though it computes the same."""
    with pytest.raises(UnjudgedError, match=r"reference itself is not finite in float64 at 2 of 3 places, first last"):
        compared(loader(act), loader(act))


def test_a_reference_whose_gradients_are_not_finite_is_refused() -> None:

    def act(x: Any) -> Any:
        return 1 + jnp.sqrt(jnp.abs(x))

    rows = np.array([[0, 0, 0], [1, 2, 3]])
    with pytest.raises(PartlyJudgedError, match=r"reference itself is not finite in float64 at \d of 6 places"):
        compared(loader(act), loader(act), inputs={"x": rows.astype("f4")}, backward=True)


def test_an_output_of_zeros_is_refused() -> None:
    """The candidate has no activation, and nothing shows it."""
    with pytest.raises(UnjudgedError, match="reference: its output is zero everywhere"):
        compared(loader(), loader(lambda x: x), inputs={"x": np.zeros((4, 3))})


def matched(checkpoint: Any) -> Any:
    """As CLIP scores each image with each text of the batch."""
    return lambda w, x: (x @ w["first"]) @ (x[:, ::-1] @ w["first"]).T, WEIGHTS


def batch_last(checkpoint: Any) -> Any:
    return lambda w, x: (x @ w["first"]).T, WEIGHTS


def whole(checkpoint: Any) -> Any:
    return lambda w, x: x.reshape(4, 3) @ w["first"], WEIGHTS


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (matched, "a row of the reference's own output depends on the others"),
        (batch_last, "a row of the reference's own output depends on the others"),
        (whole, "the reference cannot run on one row"),
    ],
)
def test_rows_that_depend_on_each_other_in_the_reference_may_in_the_candidate(load: Any, reason: str) -> None:
    report = compared(load, load)
    assert report.passed
    assert {check.name: check.reason for check in report.checks}["behaviour/batch"] == f"in a batch: {reason}"


def test_of_one_row_nothing_is_known_of_batches() -> None:
    one = {"x": RNG.normal(size=(1, 3))}
    report = compared(loader(), loader(), inputs=one)
    assert "batch" not in [each.name for each in report.behaviour]
    assert {check.name: check.status for check in report.checks}["behaviour/batch"] == "not observed"
    assert "behaviour (in a batch: the inputs have one row)" in " ".join(summary(report).split())


def test_a_reference_that_rounds_otherwise_afterwards_is_unchanged() -> None:
    output = RNG.normal(size=(4, 2))
    require_unchanged("mine", ("digest", output), ("digest", output * (1 + 1e-15)))
    with pytest.raises(InputError, match="mine: it changes the reference, its output"):
        require_unchanged("mine", ("digest", output), ("digest", output * (1 + 1e-9)))


def test_attention_is_run_in_one_way_only_if_the_caller_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(session, "require_same_attention", lambda *given: asked.append(given) or "")
    for attention in (True, False):
        reference = vit_ref.Reference(load=loader(), inputs=inputs, attention=attention)
        assert vit_ref.compare(reference, vit_ref.Candidate(load=loader()), backward=False).passed
    assert len(asked) == 1


def test_a_value_shown_twice_by_the_reference_is_no_site() -> None:
    def load(checkpoint: Any) -> Any:
        def forward(w: Any, x: Any, tap: Any = lambda name, value: value) -> Any:
            return tap("last", tap("block00", tap("block00", x @ w["first"])) @ w["second"])

        return forward, WEIGHTS

    report = compared(load, loader(lambda x: x))
    assert [result.site for result in report.forward.results] == ["last", "output"]
    assert any("run more than once in a pass: block0" in note for note in report.notes)


def test_numbers_in_a_references_table_that_stand_for_nothing_are_refused() -> None:
    reference = vit_ref.Reference(load=loader(), inputs=inputs, sites={"layers.{i}": "layer.{i}"}, name="theirs")
    with pytest.raises(InputError, match=r"theirs: sites: the reference has no submodule 'layers\.\{i\}'"):
        vit_ref.compare(reference, vit_ref.Candidate(load=loader()))


def test_code_that_jax_cannot_trace_inside_the_candidates_own_jit_is_one_line() -> None:
    def load(checkpoint: Any) -> Any:
        @jax.jit
        def inner(x: Any) -> Any:
            return x * float(x.sum())

        return lambda w, x: inner(x @ w["first"]), WEIGHTS

    one = implement(vit_ref.Candidate(load=load, sites={}, name="mine"), Blank(), None, load(None))
    with pytest.raises(InputError, match=r"mine: the forward pass raised ConcretizationTypeError"):
        one.trace(inputs(0), FLOAT64)


def test_a_value_inside_a_jit_of_the_candidates_own_is_not_hashed() -> None:
    def load(checkpoint: Any) -> Any:
        def forward(w: Any, x: Any, tap: Any = lambda name, value: value) -> Any:
            return jax.jit(lambda x: tap("hidden", x @ w["first"]))(x)

        return forward, WEIGHTS

    one = implement(vit_ref.Candidate(load=load, sites=None, name="mine"), Blank(), None, load(None))
    assert require_repeatable(one, inputs(0)).shape == (4, 5)


def test_a_site_that_the_reference_shows_in_float64_alone_is_one_line() -> None:
    def load(checkpoint: Any) -> Any:
        def forward(w: Any, x: Any, tap: Any = lambda name, value: value) -> Any:
            hidden = x @ w["first"]
            return tap("last", (tap("hidden", hidden) if x.dtype == jnp.float64 else hidden) @ w["second"])

        return forward, WEIGHTS

    with pytest.raises(UnjudgedError, match=r"^reference shows no hidden in float32, so nothing can be compared there"):
        compared(load, loader(lambda x: x))


@pytest.mark.parametrize("kind", [jnp.int32, jnp.bool_])
def test_an_output_that_is_no_float_is_one_line(kind: Any) -> None:
    def load(checkpoint: Any) -> Any:
        forward, weights = loader()(None)
        return lambda w, x: (forward(w, x) * 9).astype(kind), weights

    with pytest.raises(InputError, match=rf"^reference: output has dtype {jnp.dtype(kind)}, and only floats can"):
        compared(load, load)
    with pytest.raises(InputError, match=rf"^candidate: output has dtype {jnp.dtype(kind)}, and only floats can"):
        compared(loader(), load)


def test_a_candidate_that_differs_between_runs_is_refused() -> None:
    rng, rows = np.random.default_rng(0), []

    def load(checkpoint: Any) -> Any:
        forward, weights = loader()(None)

        def noisy(w: Any, x: Any) -> Any:
            rows.append(len(x))
            return forward(w, x) * rng.normal()

        return noisy, weights

    with pytest.raises(InputError, match=r"^candidate: two runs on the same inputs differ"):
        compared(loader(), load)
    every = len(inputs(0)["x"])
    assert rows == [1, 1, every, every]


def test_a_candidate_that_needs_the_whole_batch_is_compared_before_it_is_refused() -> None:
    every = len(inputs(0)["x"])

    def load(checkpoint: Any) -> Any:
        forward, weights = loader()(None)
        return lambda w, x: forward(w, x.reshape(every, -1)), weights

    parts: list[Any] = []
    with pytest.raises(CandidateError, match=r"^candidate: the forward pass raised TypeError: cannot reshape"):
        compared(loader(), load, on_part=parts.append)
    assert [part.passed for part in parts] == [True]


@pytest.mark.parametrize("given", [3, ["a"], b"weights"])
def test_a_checkpoint_that_is_no_path_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=rf"^checkpoint is a {type(given).__name__}: give a path that both sides load"):
        compared(loader(), loader(), checkpoint=given)


def test_a_wrong_reference_is_said_before_the_candidates_file_is_imported(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("raise ValueError('this file is broken')")
    reference = vit_ref.Reference(load=loader(), inputs=lambda seed: {"x": np.zeros((4, 3))})
    with pytest.raises(UnjudgedError, match="its output is zero everywhere"):
        vit_ref.compare(reference, f"{tmp_path}/mine.py")
    with pytest.raises(InputError, match="ValueError: this file is broken"):
        vit_ref.compare(vit_ref.Reference(load=loader(), inputs=inputs), f"{tmp_path}/mine.py")


def test_importing_the_candidates_file_may_not_change_the_reference(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp, vit_ref, tests.compare.test_unsound as theirs\n"
        "theirs.SHARED['act'] = jnp.sin\n"
        "candidate = vit_ref.Candidate(load=theirs.loader(lambda x: theirs.SHARED['act'](x)))\n"
    )
    SHARED["act"] = jnp.tanh
    with pytest.raises(InputError, match="mine: it changes the reference, its output"):
        vit_ref.compare(
            vit_ref.Reference(load=loader(lambda x: SHARED["act"](x)), inputs=inputs), f"{tmp_path}/mine.py"
        )
