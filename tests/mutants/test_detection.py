"""Does the suite detect faults? Each test puts one fault into a right candidate and reads the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
import pytest
from jax.typing import DTypeLike
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from tests.helpers.remembered import remembered_references
from tests.mutants.catalogue.activation import one_plus_erf
from tests.mutants.direct import operation_by_operation
from vit_ref.errors import TruncatedError, UnjudgedError
from vit_ref.model import vit
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import Precision
from vit_ref.verify.references import flax_vit
from vit_ref.verify.report import headline, table
from vit_ref.verify.results import ParityReport
from vit_ref.verify.session import Session
from vit_ref.weights import checkpoint
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.pretrained import read_configuration


class Faulty(OwnCandidate):
    """The right candidate with its trace changed afterwards, or its block's input replaced."""

    def __init__(self, config: ViTConfig, source: Checkpoint, fault):
        super().__init__(config, source)
        self.fault = fault

    def trace(self, pixels: NDArray, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        return self.fault(super().trace(pixels, precision, replace), precision.dtype)


def check(name: str, fault) -> ParityReport:
    case, source = CASES[name], CASES[name].checkpoint()
    with remembered_references():
        return Session(case.config, source, case.images(), Faulty(case.config, source, fault), title=name).forward()


def check_with_config(name: str, **fields: object) -> ParityReport:
    """Makes the candidate follow another configuration than the checkpoint's."""
    case, source = CASES[name], CASES[name].checkpoint()
    wrong = OwnCandidate(dataclasses.replace(case.config, **fields), source)
    with remembered_references():
        return Session(case.config, source, case.images(), wrong, title=name).forward()


@pytest.fixture
def tanh_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vit.ACTIVATIONS, "gelu", partial(jax.nn.gelu, approximate=True))


@pytest.mark.usefixtures("tanh_gelu")
def test_tanh_gelu_is_named_at_the_first_activation() -> None:
    case, source = CASES["rectangular"], CASES["rectangular"].checkpoint()
    report = Session(case.config, source, case.images(), OwnCandidate(case.config, source), title="tanh").forward()
    assert not report.passed
    assert report.semantic_failures[0].site == "block.0.mlp.hidden"
    # Random weights spread the MLP's input wider than training does, and the two forms differ less there.
    assert report.results[-1].ratio > 100
    first, cause, _, blame, output = headline(report).splitlines()
    assert cause.startswith(
        "  likely cause: tanh GELU: the same bug in the oracle lowers the error at block.0.mlp.hidden from "
    )
    assert "first divergence at block.0.mlp.hidden" in first
    assert "logits" in output
    worst = max(result.alone.rms for result in report.results if result.site.startswith("block."))
    assert blame.endswith(f"wrong even with the reference's input: blocks 0 to 1 from mlp.hidden on ({worst:.1e})")


@pytest.mark.optimised
@pytest.mark.usefixtures("tanh_gelu")
def test_tanh_gelu_is_named_on_the_given_checkpoints(pytestconfig: pytest.Config) -> None:
    paths, images = pytestconfig.getoption("checkpoint", None), pytestconfig.getoption("images", None)
    if not paths:
        pytest.skip("needs real weights: --checkpoint DIR_OR_HUB_ID")
    for path in paths:
        source = checkpoint.read(path)
        config = read_configuration(source)
        if config.hidden_act != "gelu":
            pytest.skip(f"{path} uses {config.hidden_act}")
        pixels = pixels_for(config, images, 1)
        report = Session(config, source, pixels, OwnCandidate(config, source), title="tanh").forward()
        assert report.semantic_failures[0].site == "block.0.mlp.hidden"
        assert report.results[-1].ratio > 1000


def test_layer_norm_epsilon_is_named_at_the_first_norm() -> None:
    report = check_with_config("hard-tokens", layer_norm_eps=1e-6)
    assert report.semantic_failures[0].site == "block.0.norm1"


def test_another_epsilon_fails_on_ordinary_tokens_too() -> None:
    report = check_with_config("rectangular", layer_norm_eps=1e-6)
    assert report.semantic_failures[0].site == "block.0.norm1"


def test_one_wrong_element_of_one_tensor_is_localised() -> None:
    case, source = CASES["stored-bfloat16"], CASES["stored-bfloat16"].checkpoint()
    candidate = OwnCandidate(case.config, source)
    wrong = candidate.parameters["blocks.1.attn.value.kernel"].astype(np.float32)
    wrong[3, 5] *= 1 + 1e-4
    candidate.parameters["blocks.1.attn.value.kernel"] = wrong
    report = Session(case.config, source, case.images(), candidate, title="element").forward()
    assert report.semantic_failures[0].site == "block.1.attn.value"
    # All later values diverge, but with the reference's input only block 1 does.
    assert {result.site for result in report.semantic_failures} >= {"block.2.mlp.out", "logits"}
    alone = {result.site for result in report.results if not result.alone.passes_semantic_gate}
    assert alone == {f"block.1.{site}" for site in ("attn.value", "attn.context", "attn.out", "attn.residual")} | {
        f"block.1.{site}" for site in ("norm2", "mlp.fc1", "mlp.hidden", "mlp.out", "mlp.residual")
    }
    assert "wrong even with the reference's input: block.1 " in headline(report)


def test_too_much_rounding_fails_only_the_numerical_gate() -> None:
    def half_precision_in_one_place(trace: Trace, dtype: np.dtype) -> Trace:
        if dtype == np.float32:
            site = "block.1.attn.context"
            trace[site] = trace[site].astype(np.float16).astype(np.float32)
        return trace

    report = check("rectangular", half_precision_in_one_place)
    assert not report.semantic_failures
    assert [result.site for result in report.numerical_failures] == ["block.1.attn.context"]
    assert "float32 rounding is too large: first divergence at block.1.attn.context" in headline(report)
    marked = [line for line in table(report).splitlines() if line.endswith("rounding")]
    assert [line.split()[0] for line in marked] == ["block.1.attn.context"]


@pytest.mark.parametrize(
    ("shift", "seen"),
    # The error of the site in units of the reference's own: 1, 2, 17, 57.
    [(0, False), (-2, False), (-4, True), (-5, True)],
)
def test_a_gelu_that_cancels_fails_only_far_from_zero(
    shift: float, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifts every input of the activations. Around 0 no gate can tell the two forms apart."""
    monkeypatch.setitem(vit.ACTIVATIONS, "gelu", one_plus_erf)
    case = CASES["rectangular"]
    tensors = {
        name: value + np.float32(shift) if name.endswith("intermediate.dense.bias") else value
        for name, value in case.checkpoint().tensors.items()
    }
    source = dataclasses.replace(case.checkpoint(), tensors=tensors)
    with operation_by_operation():
        candidate = OwnCandidate(case.config, source)
        report = Session(case.config, source, case.images(), candidate, title="tail").forward()
    assert not report.semantic_failures
    assert [result.site for result in report.numerical_failures[:1]] == (["block.0.mlp.hidden"] if seen else [])


def test_a_site_that_is_not_shown_has_not_passed() -> None:
    def hide(trace: Trace, dtype: np.dtype) -> Trace:
        del trace["block.1.norm2"]
        return trace

    report = check("rectangular", hide)
    assert report.unobserved == ("block.1.norm2",)
    assert not report.passed
    assert "1 claimed site not shown, first block.1.norm2" in headline(report)


def test_a_reference_with_an_unobserved_site_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flax_vit.FlaxViTReference.trace

    def all_but_one(self, pixels: NDArray, dtype: DTypeLike) -> Trace:
        return {site: value for site, value in whole(self, pixels, dtype).items() if site != "block.0.norm2"}

    monkeypatch.setattr(flax_vit.FlaxViTReference, "trace", all_but_one)
    with pytest.raises(UnjudgedError, match=r"FlaxViT shows no block\.0\.norm2 in float64"):
        check("stored-float64", lambda trace, dtype: trace)


def test_nan_and_wrong_shape_fail_both_gates() -> None:
    def spoil(trace: Trace, dtype: np.dtype) -> Trace:
        trace["norm"] = np.where(np.arange(trace["norm"].shape[-1]) == 7, np.nan, trace["norm"])
        trace["logits"] = trace["logits"][:, :-1]
        return trace

    report = check("rectangular", spoil)
    assert [result.site for result in report.semantic_failures] == ["norm", "logits"]
    assert [result.site for result in report.numerical_failures] == ["norm", "logits"]


def test_a_float64_value_truncated_to_float32_fails() -> None:
    def truncate(trace: Trace, dtype: np.dtype) -> Trace:
        return {site: value.astype(np.float32) for site, value in trace.items()}

    with pytest.raises(TruncatedError, match="vit_ref must compute in float64, but 30 of 30 sites do not"):
        check("rectangular", truncate)


def test_one_value_that_is_float32_is_wrong_there() -> None:
    def cast(trace: Trace, dtype: np.dtype) -> Trace:
        return {**trace, "block.1.norm1": trace["block.1.norm1"].astype(np.float32)}

    report = check("rectangular", cast)
    assert [result.site for result in report.semantic_failures] == ["block.1.norm1"]
    assert [cause.label for cause in report.causes] == ["rounded to float32"]


def test_the_reference_in_float32_is_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    active = Precision.active
    monkeypatch.setattr(Precision, "active", lambda precision: active(precision_of(np.float32)))
    case, source = CASES["rectangular"], CASES["rectangular"].checkpoint()
    with (
        pytest.raises(TruncatedError, match="FlaxViT must compute in float64"),
        pytest.warns(UserWarning, match="float64"),
    ):
        Session(case.config, source, case.images(), OwnCandidate(case.config, source), title="x64 off").forward()


@pytest.mark.parametrize(
    ("version", "message"), [("5.1.0", "transformers 5.1.0 has no FlaxViT"), (None, "transformers, which is not inst")]
)
def test_without_flaxvit_parity_says_what_to_install(
    version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise flax_vit.importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(flax_vit.importlib.metadata, "version", installed)
    case, source = CASES["rectangular"], CASES["rectangular"].checkpoint()
    with pytest.raises(flax_vit.ReferenceUnavailableError, match=message) as caught:
        Session(case.config, source, case.images(), OwnCandidate(case.config, source), title="no reference").forward()
    assert "pip install 'transformers>=4.50,<5'" in str(caught.value)
