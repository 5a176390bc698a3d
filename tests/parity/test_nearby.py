"""Is bad luck told from rounding that is too large, by measuring on nearby inputs?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.compare.forward import compare_forward
from vit_ref.verify.compare.nearby import NEARBY, nearby_inputs
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.gates import error
from vit_ref.verify.precision import PRECISIONS, Precision
from vit_ref.verify.problem import Problem
from vit_ref.verify.results import ParityReport

FLOAT32 = PRECISIONS["float32"]
SHAPE = (2, 40, 3)
TOKENS = {"x": np.random.default_rng(0).uniform(0.5, 1.5, SHAPE).astype(np.float32)}
# Relative errors in float32: what every token has, and what one token has now and then.
USUAL, RARE = 1e-7, 1e-4


class Rounds:
    """Returns its inputs, and errs in float32.

    Args:
      errs: returns the error of one token, from the number of the run in float32.
      everywhere: the error of the others.
    """

    foreign, claims, streams = False, None, None
    fixed: frozenset[str] = frozenset()

    def __init__(self, name: str, errs: Callable[[int], float], everywhere: float = USUAL):
        self.name, self.errs, self.everywhere = name, errs, everywhere
        self.runs = 0

    def trace(self, inputs: Any, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        value = inputs["x"].astype(np.float64)
        if precision.dtype == np.float64:
            return {"x": value}
        signs = np.where(np.random.default_rng(self.runs).random(value.shape) < 0.5, 1, -1)
        factors = np.full(value.shape, self.everywhere) * signs
        factors[1, 7] += self.errs(self.runs)
        self.runs += 1
        return {"x": value * (1 + factors)}


class Spreads(Rounds):
    """Has a second site, where all tokens err by a twentieth of what the one token of the first erred by.

    Args:
      coarse: returns a further error of every token there.
    """

    def __init__(self, name: str, errs: Callable[[int], float], coarse: Callable[[int], float] | None = None):
        super().__init__(name, errs)
        self.coarse = coarse or never

    def trace(self, inputs: Any, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        run, found = self.runs, super().trace(inputs, precision, replace)
        error = USUAL + self.errs(run) / 20 + self.coarse(run) if precision.dtype == np.float32 else 0.0
        signs = np.where(np.random.default_rng(run + 100).random(SHAPE) < 0.5, 1, -1)
        return {**found, "y": inputs["x"].astype(np.float64) * (1 + error * signs)}


def never(run: int) -> float:
    return 0.0


def always(run: int) -> float:
    return RARE


def later(run: int) -> float:
    return RARE * (run in (2, 5))


def judged(reference: Rounds, candidate: Rounds, inputs: Any = TOKENS, **options: Any) -> ParityReport:
    sites = ("x", "y") if isinstance(reference, Spreads) else ("x",)
    problem = Problem(inputs, dict.fromkeys(sites, SHAPE), None, SHAPE, ())
    return compare_forward("rounded", problem, reference, None, candidate, FLOAT32, **options)  # type: ignore[arg-type]


def test_a_right_candidate_passes_beside_a_lucky_reference() -> None:
    reference, candidate = Rounds("reference", later), Rounds("candidate", lambda run: RARE * (run in (0, 3)))
    report = judged(reference, candidate)
    assert report.passed
    assert report.nearby == NEARBY
    assert reference.runs == candidate.runs == NEARBY + 1
    (result,) = report.results
    # Two of eight runs err at one token of eighty.
    expected = math.sqrt(2 / 8) * error(Rounds("once", always).trace(TOKENS, FLOAT32)["x"], TOKENS["x"]).rms
    assert (result.rounding, result.reference_error) == pytest.approx((expected, expected), rel=1e-2)


@pytest.mark.parametrize("errs", [never, later])
def test_a_candidate_that_errs_there_each_time_fails(errs: Callable[[int], float]) -> None:
    """Pooled over all runs, a reference that errs in two of them would allow it."""
    report = judged(Rounds("reference", errs), Rounds("candidate", always))
    assert not report.passed
    assert report.nearby == NEARBY


def test_what_bad_luck_spreads_to_passes_and_what_is_always_there_fails() -> None:
    # The second site errs in five runs of eight, and the reference's in one: pooled, 2.2 times as much.
    lucky = Spreads("reference", lambda run: RARE * (run == 2))
    right = judged(lucky, Spreads("candidate", lambda run: RARE * (run in (0, 3, 4, 6, 7))))
    assert right.passed and right.nearby == NEARBY
    wrong = judged(
        Spreads("reference", later), Spreads("candidate", lambda run: RARE * (run in (0, 3)), lambda _: 20 * USUAL)
    )
    assert [result.site for result in wrong.numerical_failures] == ["y"]
    assert wrong.nearby == NEARBY
    assert wrong.results[1].rounding == pytest.approx(21 * USUAL, rel=0.01)
    # If the first site is beyond its gate for no bad luck, nothing is measured again.
    even = Spreads("candidate", never)
    even.everywhere = 20 * USUAL
    assert judged(Spreads("reference", never), even).nearby == 0


@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("fault", ["raises", "hides"])
def test_inputs_on_which_a_side_cannot_run_do_not_count(side: str, fault: str) -> None:
    """A person's own check of the inputs may refuse them, or take another branch."""

    class Picky(Rounds):
        def trace(self, inputs: Any, precision: Precision, replace: Any = None) -> Trace:
            if self.name == side and inputs["x"][0, 0, 0] != TOKENS["x"][0, 0, 0]:
                if fault == "raises":
                    raise ValueError("these are no tokens")
                return {}
            return super().trace(inputs, precision, replace)

    report = judged(Picky("reference", later), Picky("candidate", lambda run: RARE * (run == 0)))
    assert not report.passed
    assert report.nearby == 0


def test_a_candidate_that_is_not_finite_beside_its_inputs_fails_and_says_so() -> None:
    report = judged(
        Rounds("reference", later), Rounds("candidate", lambda run: math.nan if run == 3 else RARE * (run == 0))
    )
    assert report.results[0].failure("float32") == "not finite on nearby inputs in float32"
    # It fails too where the least error decides.
    unlucky = Spreads("candidate", lambda run: RARE * (run in (0, 3)), lambda run: math.nan if run == 5 else 0.0)
    report = judged(Spreads("reference", later), unlucky)
    assert report.results[0].passes_numerical_gate
    assert report.results[1].failure("float32") == "not finite on nearby inputs in float32"


def test_an_even_error_is_no_bad_luck() -> None:
    candidate = Rounds("candidate", never, everywhere=20 * USUAL)
    report = judged(Rounds("reference", never), candidate)
    assert not report.passed
    assert report.nearby == 0
    assert candidate.runs == 2  # the second one is of the part alone


def test_a_candidate_within_its_gate_runs_once() -> None:
    candidate = Rounds("candidate", never)
    assert judged(Rounds("reference", never), candidate).passed
    assert candidate.runs == 1


def test_a_gate_allows_for_the_luck_of_the_reference() -> None:
    candidate = Rounds("candidate", lambda run: 20 * RARE)
    assert judged(Rounds("reference", always), candidate).passed
    assert candidate.runs == 1


def test_inputs_that_cannot_be_moved_leave_the_first_verdict() -> None:
    whole = {"x": np.round(10 * TOKENS["x"])}
    report = judged(Rounds("reference", later), Rounds("candidate", lambda run: RARE * (run == 0)), whole)
    assert not report.passed
    assert report.nearby == 0
    assert not judged(Rounds("reference", later), Rounds("candidate", always), runs_nearby=None).passed


def test_runs_in_which_the_reference_is_not_finite_do_not_count() -> None:
    """Their gate would be infinite."""
    reference = Rounds("reference", lambda run: math.inf if run in (1, 4) else 0.0)
    report = judged(reference, Rounds("candidate", always))
    assert not report.passed
    assert report.nearby == NEARBY - 2


@pytest.mark.parametrize(("precision", "most"), [("float32", 2**-20), ("tensorfloat32", 2**-7), ("bfloat16", 2**-4)])
def test_nearby_inputs_move_fractions_alone_and_towards_zero(precision: str, most: float) -> None:
    given = {
        "images": np.float32([[0.25, -0.75, 1.0, 0.0]]),
        "mask": np.float32([[0.0, np.finfo(np.float32).min]]),
        "ids": np.array([[3, 1]]),
        "half": np.array([[0.3]], ml_dtypes.bfloat16),
    }
    found = nearby_inputs(given, PRECISIONS[precision])
    assert len(found) == NEARBY
    for each in found:
        assert {name: value.dtype for name, value in each.items()} == {name: given[name].dtype for name in given}
        assert np.array_equal(each["mask"], given["mask"])
        assert np.array_equal(each["ids"], given["ids"])
        assert np.array_equal(each["images"][0, 2:], [1, 0])
        moved = each["images"][0, :2] / given["images"][0, :2]
        assert np.all((1 - most <= moved) & (moved <= 1))
    assert len({each["images"].tobytes() for each in found}) > NEARBY // 2
    assert nearby_inputs({"ids": given["ids"], "mask": given["mask"]}, PRECISIONS[precision]) == []
