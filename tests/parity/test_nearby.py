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


def never(run: int) -> float:
    return 0.0


def always(run: int) -> float:
    return RARE


def later(run: int) -> float:
    return RARE * (run in (2, 5))


def judged(reference: Rounds, candidate: Rounds, inputs: Any = TOKENS, **options: Any) -> ParityReport:
    problem = Problem(inputs, {"x": SHAPE}, None, SHAPE, ())
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


def test_a_candidate_that_errs_there_each_time_fails() -> None:
    report = judged(Rounds("reference", never), Rounds("candidate", always))
    assert not report.passed
    assert report.nearby == NEARBY


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
    assert not judged(Rounds("reference", later), Rounds("candidate", always), redraw=False).passed


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
