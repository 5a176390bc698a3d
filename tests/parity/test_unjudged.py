"""What does the suite report if no verdict is possible: the reference overflows, or the two oracles differ?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from tests.helpers.precisions import precision_of
from tests.helpers.synthetic_reports import REPORTS
from vit_ref.errors import (
    InputError,
    OraclesDifferError,
    PartlyJudgedError,
    ReferenceOverflowError,
    ReferenceUnavailableError,
    UndifferentiableError,
    UnsupportedByReferenceError,
)
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.compare.forward import compare_forward
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.judgement import complete, judge_gradients
from vit_ref.verify.precision import PRECISIONS, Precision
from vit_ref.verify.references.choice import NumpyReference, reference_for
from vit_ref.verify.results import ParityReport
from vit_ref.verify.session import Session
from vit_ref.verify.vit import problem_of
from vit_ref.weights.checkpoint import Checkpoint

CASE = CASES["rectangular"]


class Changed:
    """Multiplies the oracle's values at one site, in one dtype."""

    claims = stored = None
    foreign = False
    fixed: frozenset[str] = frozenset()
    config = CASE.config

    def __init__(self, name: str, site: str, by: float, dtype: DTypeLike):
        self.name, self.site, self.by, self.dtype = name, site, by, np.dtype(dtype)
        self.oracle = NumpyReference(CASE.config, CASE.checkpoint().tensors)

    def trace(self, pixels: NDArray, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        dtype = precision.dtype
        found = {site: value.astype(dtype) for site, value in self.oracle.trace(pixels).items()}
        if dtype == self.dtype:
            found[self.site] = found[self.site] * self.dtype.type(self.by)
        return found


def judged(reference: Changed, candidate: Changed, oracle: Changed | None = None) -> ParityReport:
    problem = problem_of(CASE.config, CASE.images())
    return compare_forward("unjudged", problem, reference, oracle or reference.oracle, candidate, PRECISIONS["float32"])


OVERFLOWING = Changed("reference", "block.1.mlp.out", np.inf, np.float32)


def test_a_reference_that_overflows_is_refused() -> None:
    with pytest.raises(
        ReferenceOverflowError,
        match=r"^reference itself is not finite in float32 at 1 of 30 places, first block\.1\.mlp\.out: judge another",
    ):
        judged(OVERFLOWING, Changed("candidate", "norm", 2.0, np.float32))


def test_a_wrong_formula_is_reported_if_the_reference_overflows() -> None:
    report = judged(OVERFLOWING, Changed("candidate", "norm", 1.5, np.float64))
    assert [result.site for result in report.semantic_failures] == ["norm"]


def test_oracles_that_differ_are_refused() -> None:
    """No verdict is given on a candidate either that is wrong elsewhere."""
    right, other = (
        Changed(name, "block.1.mlp.out", by, np.float64) for name, by in (("reference", 1.0), ("other", 1.001))
    )
    for candidate in (right, other):
        with pytest.raises(
            OraclesDifferError,
            match=r"^reference and other differ in float64 at 1 of 30 sites, first block\.1\.mlp\.out by 1\.0e-03",
        ):
            judged(right, candidate, other)


@pytest.mark.parametrize(
    ("error", "is_open"),
    [
        (UnsupportedByReferenceError("the NumPy oracle has no gradients"), False),
        (UndifferentiableError("its output has no gradient"), False),
        (ReferenceOverflowError("reference itself is not finite at {place}", "norm"), True),
        (InputError("another"), True),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else "",
)
@pytest.mark.parametrize("name", ["right", "wrong"])
def test_forward_findings_survive_missing_gradients(name: str, error: InputError, is_open: bool) -> None:
    def measure() -> ParityReport:
        raise error

    gradients, reason, unjudged = judge_gradients(measure)
    assert (gradients, reason, unjudged) == (None, str(error), is_open)
    report = dataclasses.replace(REPORTS[name](), backward=None, not_backward=reason)
    if is_open and report.passed:
        with pytest.raises(PartlyJudgedError, match=re.escape(str(error))) as caught:
            complete(report, unjudged)
        assert caught.value.report is report
    else:
        assert complete(report, unjudged) is report


def test_gradients_measured_or_not_requested_settle_a_check() -> None:
    report = REPORTS["right"]().forward
    assert judge_gradients(lambda: report) == (report, "", False)
    assert judge_gradients(None) == (None, "not requested", False)


@pytest.mark.parametrize("reference", ["flax", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_reference_whose_gradients_overflow_is_refused(reference: str) -> None:
    """Values are small and then multiplied by a large factor. The forward pass is finite."""
    case = Case("one-block", dataclasses.replace(CASE.config, num_hidden_layers=1))
    source = case.checkpoint()
    block, tensors = "vit.encoder.layer.0", dict(source.tensors)
    for name, by in (
        ("layernorm_after.weight", 2e-5),
        ("layernorm_after.bias", 2e-5),
        ("intermediate.dense.weight", 4e4),
        ("output.dense.weight", 30),
    ):
        tensors[f"{block}.{name}"] = tensors[f"{block}.{name}"] * np.float32(by)
    changed = Checkpoint(source.path, tensors, source.config)
    try:
        chosen = reference_for(case.config, tensors, reference)
    except ReferenceUnavailableError as error:
        pytest.skip(str(error))
    candidate = OwnCandidate(case.config, changed)
    assert all(np.isfinite(value).all() for value in chosen.trace(case.images(), precision_of(np.float16)).values())
    with pytest.raises(
        ReferenceOverflowError,
        match=r"^(FlaxViT|PyTorch) itself is not finite in float16 at \d+ of 42 places, first block\.0\.norm2:",
    ):
        Session(case.config, changed, case.images(), candidate, "float16", chosen, title="over").backward()
