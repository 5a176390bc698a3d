"""Can any candidate be compared with any reference, and is a wrong one found at its wrong site?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import vit_ref
from tests.compare import sides
from vit_ref.verify.compare.forward import isolated
from vit_ref.verify.gates import Error
from vit_ref.verify.report import summary
from vit_ref.verify.results import CandidateReport

torch_side = pytest.importorskip("tests.compare.torch_side", reason="needs PyTorch: pip install 'vit-ref[torch]'")
pytestmark = pytest.mark.torch
EVERY = {"embed", "proj", "head", "output"} | {
    f"blocks.{i}{end}" for i in range(sides.BLOCKS) for end in ("", ".norm", ".fc1", ".act", ".fc2")
}


def names(report: CandidateReport, status: str) -> list[str]:
    return [check.name for check in report.checks if check.status == status]


@pytest.fixture(scope="module")
def right() -> CandidateReport:
    return vit_ref.compare(torch_side.reference(), sides.in_nnx())


def test_a_right_candidate_of_any_kind_passes_every_check(right: CandidateReport) -> None:
    assert right.passed and not names(right, "failed")
    assert {result.site for result in right.forward.results} == EVERY
    gradients = {result.site for result in right.backward.results}
    assert gradients == EVERY | sides.weights().keys() | {"input:features"}
    assert {each.name for each in right.behaviour} == {"repeat", "batch", "jit", "untapped"}
    assert not names(right, "not observed")


def test_a_report_says_that_the_reference_is_the_only_truth(right: CandidateReport) -> None:
    assert "the reference is the only truth" in summary(right)
    assert right.checkpoint.name == "torch's own weights" and len(right.checkpoint.sha256) == 64


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (torch_side.reference, torch_side.candidate),
        (torch_side.reference, sides.function),
        (torch_side.reference, sides.in_linen),
        (
            lambda: sides.in_linen(vit_ref.Reference, inputs=sides.inputs),
            lambda: sides.in_linen(sites={"up{i}": "up{i}"}),
        ),
        (
            lambda: vit_ref.Reference(load=lambda checkpoint: sides.NnxModel(), inputs=sides.inputs),
            lambda: vit_ref.Candidate(load=lambda checkpoint: sides.NnxModel(), sites={"layers.{i}": "layers.{i}"}),
        ),
    ],
    ids=["torch and torch", "torch and a function", "torch and linen", "linen and linen", "nnx and nnx"],
)
def test_either_side_may_be_written_in_anything(reference: Callable[[], Any], candidate: Callable[[], Any]) -> None:
    report = vit_ref.compare(reference(), candidate())
    assert report.passed
    assert report.backward.results[-1].site == "input:features"
    assert len(report.backward.results) > len(sides.weights())


@pytest.mark.parametrize(
    ("candidate", "site", "cause"),
    [
        (sides.in_nnx(sides.tanh_gelu), "blocks.0.act", "tanh GELU for erf GELU"),
        (sides.function(act=jax.nn.silu), "blocks.0.act", "SiLU for erf GELU"),
        (sides.function(residual=False), "blocks.0", "the value of blocks.0.fc2 in its place"),
        # The activation is not shown, so the reference is run with another one.
        (
            vit_ref.Candidate(
                load=lambda checkpoint: sides.NnxModel(sides.tanh_gelu), sites={"layers.{i}": "blocks.{i}"}
            ),
            "blocks.0",
            "at blocks.0.act, tanh GELU for erf GELU",
        ),
    ],
    ids=["nnx", "function", "no residual", "unseen"],
)
def test_a_wrong_candidate_is_localised_and_its_fault_named(
    candidate: vit_ref.Candidate, site: str, cause: str
) -> None:
    report = vit_ref.compare(torch_side.reference(), candidate, backward=False, fail_fast=True)
    assert not report.passed
    assert report.forward.semantic_failures[0].site == site
    assert cause in [each.label for each in report.forward.causes]


def test_each_part_is_judged_alone() -> None:
    report = vit_ref.compare(torch_side.reference(), sides.function(act=sides.tanh_gelu), backward=False)
    wrong = [r.site for r in report.forward.results if r.alone and not r.alone.passes_semantic_gate]
    assert wrong == ["blocks.0.act", "blocks.1.act"]
    said = " ".join(summary(report).split())
    assert "wrong even with the reference's values before it: blocks.{i}.act, 2 times" in said


def test_rounding_is_judged_by_the_references_own() -> None:
    def coarse(x: Any) -> Any:
        return sides.gelu(x).astype(x.dtype if x.dtype == np.float64 else np.float16).astype(x.dtype)

    report = vit_ref.compare(torch_side.reference(), sides.function(act=coarse), backward=False)
    assert not report.forward.semantic_failures
    assert report.forward.numerical_failures[0].site == "blocks.0.act"
    assert [cause.label for cause in report.forward.causes] == ["rounded to float16"]


def test_bfloat16_is_compared_on_parameters_that_are_rounded() -> None:
    report = vit_ref.compare(torch_side.reference(), sides.function(), precision="bfloat16", backward=False)
    assert report.passed
    assert 1e-4 < report.forward.results[-1].reference_error < 1e-1


def test_a_fault_that_cannot_be_replaced_blames_no_other_part() -> None:
    right, wrong = Error(1e-16, 1e-16), Error(1e-3, 1e-3)
    errors = {"fc1": right, "act": wrong, "fc2": wrong, "block": right, "norm": wrong, "head": right}
    assert list(isolated(errors, frozenset({"act", "fc1"}))) == ["fc1", "act", "block", "norm", "head"]
    assert list(isolated(errors, frozenset())) == list(errors)


class Flattening(torch_side.Block):
    """A block whose norm gets the rows in one axis."""

    def forward(self, x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        return x + self.fc2(self.act(self.fc1(self.norm(rows)))).reshape(x.shape)


def in_torch(block: type = torch_side.Block) -> vit_ref.Candidate:
    def load(checkpoint: Any) -> Any:
        model = torch_side.Model()
        model.blocks = torch_side.torch.nn.ModuleList([block() for _ in range(sides.BLOCKS)])
        return torch_side.loaded(model)

    return vit_ref.Candidate(
        load=load,
        sites={"blocks.1.norm:input": "blocks.0", "blocks.{i}.fc2:input": "blocks.{i}.act"},
        name="twin",
    )


class FlatteningInNnx(sides.NnxBlock):
    """The same in NNX."""

    def __call__(self, x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        return x + self.down(self.act(self.up(self.ln(rows)))).reshape(x.shape)


def in_nnx(block: type) -> vit_ref.Candidate:
    sites = {"layers.1.ln:input": "blocks.0", "layers.{i}.down:input": "blocks.{i}.act"}
    return vit_ref.Candidate(load=lambda checkpoint: sides.NnxModel(block=block), sites=sites, name="nnx")


@pytest.mark.parametrize(
    "candidate",
    [
        lambda: in_torch(),
        lambda: in_torch(Flattening),
        lambda: in_nnx(sides.NnxBlock),
        lambda: in_nnx(FlatteningInNnx),
    ],
    ids=["torch", "torch, moved", "nnx", "nnx, moved"],
)
def test_the_gradient_of_a_value_that_goes_past_a_submodule_is_not_observed(candidate: Callable[[], Any]) -> None:
    report = vit_ref.compare(torch_side.reference(), candidate())
    assert report.passed
    observed = [result.site for result in report.backward.results if result.site in EVERY]
    assert observed == ["output", "blocks.1.act", "blocks.0.act"]
    assert "backward/blocks.0" in names(report, "not observed")


class Refusing(torch_side.Block):
    """A block that runs without gradients only."""

    def forward(self, x: Any) -> Any:
        if torch_side.torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return super().forward(x)


class InNumpy(sides.NnxBlock):
    """A block that leaves jax."""

    def __call__(self, x: Any) -> Any:
        return super().__call__(jax.numpy.asarray(np.asarray(x)))


@pytest.mark.parametrize("candidate", [lambda: in_torch(Refusing), lambda: in_nnx(InNumpy)], ids=["torch", "nnx"])
def test_a_candidate_that_cannot_be_differentiated_is_compared_forward(candidate: Callable[[], Any]) -> None:
    report = vit_ref.compare(torch_side.reference(), candidate(), backward=False)
    assert report.forward.passed
    assert [result.site for result in report.forward.results] == ["blocks.0.act", "blocks.0", "blocks.1.act", "output"]
