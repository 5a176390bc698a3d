"""Candidates in PyTorch, and the modules that are hard to observe with hooks."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import vit_ref
from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError
from vit_ref.verify import session
from vit_ref.verify.candidates.loading import find
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.compare.behaviour import check_behaviour
from vit_ref.verify.compare.objectives import objectives_for
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.references.choice import reference_for
from vit_ref.verify.results import ParityReport
from vit_ref.verify.session import Session, check_port, prepare_candidate
from vit_ref.weights import checkpoint, writing
from vit_ref.weights.pretrained import read_configuration

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")

pytestmark = pytest.mark.torch

IMAGES = CASES["rectangular"].images()


@pytest.fixture
def timm(locate: Callable[[str], str]) -> vit_ref.Candidate:
    return find(locate("torch_timm.py"))


def calling(candidate: vit_ref.Candidate, call: Callable) -> vit_ref.Candidate:
    return dataclasses.replace(candidate, call=call)


def made(candidate: vit_ref.Candidate, saved: Callable[[str], Path]) -> Any:
    source = checkpoint.read(saved("rectangular"))
    return prepare_candidate(candidate, read_configuration(source), source)


def traced(candidate: vit_ref.Candidate, saved: Callable[[str], Path], dtype: Any = np.float64) -> dict[str, Any]:
    return made(candidate, saved).trace(IMAGES, precision_of(dtype))


def test_a_candidate_that_writes_into_its_images_fails(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    def call(model: Any, images: Any) -> Any:
        return model(images.mul_(2).div_(2).add_(1).sub_(0.5))

    for changed in (timm, dataclasses.replace(timm, channels_first=False, sites=None, load=lambda _: Summing())):
        behaviour = check_behaviour(made(calling(changed, call), saved), IMAGES[:2])
        failed = [(each.name, each.reason) for each in behaviour if not each.passed]
        assert failed == [("inputs", "it writes into its inputs: make it copy them first")]


class Summing(torch.nn.Module):
    def forward(self, images: Any) -> Any:
        return images.sum((1, 2, 3))[:, None] * torch.ones(23, dtype=images.dtype)


def test_values_are_kept_before_in_place_changes(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    def adding(block: Any, x: Any) -> Any:
        x += block.attn(block.norm1(x))
        x += block.mlp(block.norm2(x))
        return x

    def load(path: Path) -> Any:
        model = timm.load(path)
        for block in model.blocks:
            block.forward = adding.__get__(block)
        return model

    report = check_port(dataclasses.replace(timm, load=load), saved("rectangular"))
    assert [check for check in report.checks if check.status == "failed"] == []
    assert report.backward is None
    assert report.not_backward.startswith("torch cannot differentiate it: one of the variables needed for gradient")


def test_a_candidate_without_gradients_is_verified_forward(
    timm: vit_ref.Candidate, saved: Callable[[str], Path]
) -> None:
    report = check_port(calling(timm, torch.no_grad()(lambda model, images: model(images))), saved("one-block"))
    assert [check for check in report.checks if check.status == "failed"] == []
    assert report.not_backward == (
        "its output has no gradient: it may run under torch.no_grad; remove that from the forward pass"
    )


def test_frozen_parameters_have_gradients(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    loaded = []

    def load(path: Path) -> Any:
        loaded.append(timm.load(path).requires_grad_(False))
        return loaded[-1]

    model = made(dataclasses.replace(timm, load=load), saved)
    objective = objectives_for((5, model.outline.config.num_labels))[0]
    found = {dtype: model.gradients(IMAGES, precision_of(dtype))(objective) for dtype in ("f8", "f4")}
    for path, value in found["f8"].parameters.items():
        # Float32's rounding. The key's bias has only rounding for a gradient.
        assert path.endswith("key.bias") or error(found["f4"].parameters[path], value).rms < 1e-5
    # The module is read once, and stays as its author made it.
    (model,) = loaded
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loader_with_a_dtype_computes_in_it(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    asked = []

    def load(path: Path, dtype: np.dtype) -> Any:
        asked.append(dtype.name)
        return timm.load(path).to(getattr(torch, dtype.name))

    ours, theirs = made(dataclasses.replace(timm, load=load), saved), made(timm, saved)
    for dtype in (np.float64, np.float32):
        found, expected = (one.trace(IMAGES, precision_of(dtype)) for one in (ours, theirs))
        assert all(np.array_equal(found[site], expected[site]) for site in expected)
    assert asked == ["float64", "float32"]


def test_bfloat16_comes_over_as_it_is(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    found, expected = traced(timm, saved, ml_dtypes.bfloat16), traced(timm, saved)
    assert {value.dtype for value in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    # Eight bits of mantissa, rounded a few times.
    assert 1e-3 < error(found["logits"].astype(np.float64), expected["logits"]).rms < 3e-2


def test_a_candidate_with_a_tap_shows_its_own_values(saved: Callable[[str], Path]) -> None:
    source = checkpoint.read(saved("rectangular"))
    own = OwnCandidate(read_configuration(source), source).trace(IMAGES, FLOAT64)
    weight, bias = (torch.tensor(source.tensors[f"classifier.{leaf}"]) for leaf in ("weight", "bias"))

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(33, 23)
            self.linear.load_state_dict({"weight": weight, "bias": bias})

        def forward(self, images: Any, tap: Callable) -> Any:
            return self.linear(tap("norm", torch.zeros(len(images), 17, 33, dtype=images.dtype))[:, 0])

    model = prepare_candidate(vit_ref.Candidate(load=lambda _: Head()), read_configuration(source), source)
    found = model.trace(IMAGES, FLOAT64, replace={"norm": own["norm"]})
    assert not found["norm"].any()
    assert error(found["logits"], own["logits"]).rms < SEMANTIC_RMS


def test_unknown_submodules_and_inner_failures_are_one_line(
    timm: vit_ref.Candidate, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError, match=r"has no submodule 'blocks.0.atn' and .*; did you mean 'blocks.0.attn'\?"):
        traced(dataclasses.replace(timm, sites={"blocks.{i}.atn": "block.{i}.attn.out"}), saved)

    def sharing(path: Path) -> Any:
        model: Any = timm.load(path)
        model.blocks[1].attn = model.blocks[0].attn
        return model

    with pytest.raises(
        InputError, match=r"'blocks.1.attn.*' and 'blocks.0.attn.*' are one module with one set of parameters"
    ):
        traced(dataclasses.replace(timm, load=sharing), saved)
    with pytest.raises(InputError, match="torch_timm: the forward pass raised RuntimeError: Given groups=1") as caught:
        traced(dataclasses.replace(timm, channels_first=False), saved)
    assert "\n" not in str(caught.value)
    sites = {"blocks.{i}.attn.q_norm": ("block.{i}.attn.query", lambda x: x[0, 0, 0, 0, 0])}
    with pytest.raises(InputError, match=r"block.0.attn.query: its selection cannot be applied to a value of shape"):
        traced(dataclasses.replace(timm, sites=sites), saved)


def weight_normed(model: Any) -> None:
    torch.nn.utils.weight_norm(model.head)


def parametrized(model: Any, dim: int | None) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.head, dim=dim)


def keeping_its_attention(model: Any) -> None:
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, _, out: setattr(module, "last", [out]))
    model(torch.tensor(IMAGES).permute(0, 3, 1, 2))


def with_other_norms(module: Any) -> None:
    """The norms of its weights do not belong to its weights."""
    weight_normed(module)
    with torch.no_grad():
        module.head.weight_g.mul_(1 + 1e-5)


HELD: dict[str, Callable[[Any], Any]] = {
    "weight_norm": weight_normed,
    "weight_norm as a parametrization": partial(parametrized, dim=1),
    "one norm": partial(parametrized, dim=None),
    "an attention map": keeping_its_attention,
    "a traced module": lambda model: torch.jit.trace(model, torch.tensor(IMAGES).permute(0, 3, 1, 2)),
}


# These functions are old, and still in use.
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", HELD)
def test_a_module_that_keeps_computed_tensors_is_verified(
    what: str, timm: vit_ref.Candidate, saved: Callable[[str], Path]
) -> None:
    plain = dataclasses.replace(timm, sites=None, parameters=None)

    def load(path: Path) -> Any:
        model = timm.load(path)
        return HELD[what](model) or model

    changed = dataclasses.replace(plain, load=load)
    assert error(traced(changed, saved)["logits"], traced(plain, saved)["logits"]).rms < SEMANTIC_RMS
    objective = objectives_for((5, made(plain, saved).outline.config.num_labels))[0]
    pixels = [
        made(each, saved).gradients(IMAGES, precision_of("f8"))(objective).inputs["pixels"] for each in (changed, plain)
    ]
    assert error(*pixels).rms < SEMANTIC_RMS


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_norm_off_by_more_than_rounding_stays_wrong(
    timm: vit_ref.Candidate, saved: Callable[[str], Path]
) -> None:
    def load(path: Path) -> Any:
        model = timm.load(path)
        with_other_norms(model)
        return model

    wrong = traced(dataclasses.replace(timm, load=load), saved)["logits"]
    assert 1e-6 < error(wrong, traced(timm, saved)["logits"]).rms < 1e-4


class Locked(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 23)
        self.lock = threading.Lock()


class Narrow(torch.nn.Linear):
    def to(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("quantised modules\ncannot be cast")


UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "on meta": (
        lambda: torch.nn.Linear(3, 23, device="meta"),
        r"mine: 'weight' is on the device 'meta' and has no values: load the checkpoint",
    ),
    "with a buffer on meta": (
        lambda: torch.nn.BatchNorm1d(23, affine=False, device="meta"),
        r"mine: 'running_mean' is on the device 'meta'",
    ),
    "that cannot be copied": (Locked, r"mine: copying it raised TypeError: cannot pickle '_thread.lock' object"),
    "that cannot be cast": (lambda: Narrow(3, 23), r"mine: \.to\(torch\.float64\) raised NotImplementedError: quant"),
    "that returns meta": (
        lambda: Returning(lambda x: torch.empty(len(x), 23, device="meta", dtype=x.dtype)),
        r"mine: the forward pass raised NotImplementedError: Cannot copy out of meta tensor",
    ),
}


class Returning(torch.nn.Module):
    def __init__(self, function: Callable[[Any], Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


@pytest.mark.parametrize("what", UNUSABLE)
def test_every_failure_of_an_unusable_module_is_one_line(what: str, saved: Callable[[str], Path]) -> None:
    module, message = UNUSABLE[what]
    with pytest.raises(InputError, match=message) as caught:
        made(vit_ref.Candidate(load=lambda _: module(), name="mine"), saved).trace(IMAGES, FLOAT64)
    assert "\n" not in str(caught.value)


F = torch.nn.functional
IN_FLOAT32: dict[str, Callable[[Any], Any]] = {
    "softmax with a dtype": lambda x: F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype),
    "method with a dtype": lambda x: x.softmax(-1, torch.float32).to(x.dtype),
    "float()": lambda x: x.float().softmax(-1).type_as(x),
    "norm": lambda x: F.layer_norm(x.float(), x.shape[-1:], x.new_ones(x.shape[-1])).to(x.dtype),
    "mean": lambda x: x - x.mean(-1, keepdim=True, dtype=torch.float32),
}


@pytest.mark.parametrize("what", IN_FLOAT32)
def test_a_module_float32_by_design_is_exact_in_float64(what: str, saved: Callable[[str], Path]) -> None:
    def forward(x: Any) -> Any:
        return IN_FLOAT32[what](x.flatten(2)).square().sum((1, 2))[:, None] * x.new_ones(23)

    model = made(vit_ref.Candidate(load=lambda _: Returning(forward)), saved)
    found = model.trace(IMAGES, FLOAT64)["logits"]
    images = torch.tensor(IMAGES, dtype=torch.float64).permute(0, 3, 1, 2).flatten(2)
    exact = {"mean": lambda x: x - x.mean(-1, keepdim=True), "norm": lambda x: F.layer_norm(x, x.shape[-1:])}
    right = exact.get(what, lambda x: x.softmax(-1))(images).square().sum((1, 2))[:, None].numpy()
    assert error(found[:, :1], right).rms < SEMANTIC_RMS
    (note,) = model.notes
    assert note.startswith("the candidate makes a cast from float64 to float32, the first before logits. ")
    # In the tested precision no cast is undone.
    assert model.trace(IMAGES, precision_of(np.float32))["logits"].dtype == np.float32


def test_fused_attention_passes_despite_its_larger_rounding(
    locate: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens attend to one in the first head, with scores of some hundreds, so the rounded logarithm is far off."""
    case = Case("sink", dataclasses.replace(CASES["rectangular"].config, num_hidden_layers=1), seed=2)
    tensors, attention = case.checkpoint().tensors, "vit.encoder.layer.0.attention.attention"
    tensors[f"{attention}.query.bias"][0] += 40
    tensors[f"{attention}.key.weight"][0] *= 10
    writing.write_directory(tmp_path, tensors, case.config.to_hf())
    source = checkpoint.read(tmp_path)
    reference = reference_for(case.config, source.tensors)

    def judged(name: str) -> ParityReport:
        candidate = prepare_candidate(locate(f"torch_timm.py:{name}"), case.config, source)
        return Session(case.config, source, IMAGES[:2], candidate, reference=reference, title="sink").backward()

    assert judged("candidate").passed
    report = judged("fused")
    assert report.passed
    assert max(result.ratio for result in report.results) > 20
    # A candidate that shows its probabilities computes with them, and has no reason for such an error.
    monkeypatch.setattr(session, "with_fused_attention", None)
    assert max(result.ratio for result in judged("fused").numerical_failures) > 20


def test_a_pytorch_candidate_may_sum_in_another_order(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    source = checkpoint.read(saved("rectangular"))
    model = made(timm, saved)
    report = Session(model.outline.config, source, IMAGES, model, title="sums").forward()
    assert report.passed
    assert min(result.gate / result.reference_error for result in report.results) >= 4
