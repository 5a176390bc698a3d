"""Ports in PyTorch: what hooks have to cope with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import vit_ref
from vit_ref import checkpoint
from vit_ref.errors import InputError
from vit_ref.pretrained import configuration
from vit_ref.verify import gradients
from vit_ref.verify.backward import objectives_for
from vit_ref.verify.behaviour import check_behaviour
from vit_ref.verify.candidate import OwnCandidate
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.check import check_port, port_for
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.gradients import check_gradients
from vit_ref.verify.parity import ParityReport
from vit_ref.verify.ports.loading import find
from vit_ref.verify.references import reference_for

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")

pytestmark = [pytest.mark.candidates, pytest.mark.torch]

IMAGES = CASES["rectangular"].images()


@pytest.fixture
def timm(port: Callable[[str], str]) -> vit_ref.Candidate:
    return find(port("torch_timm.py"))


def calling(candidate: vit_ref.Candidate, call: Callable) -> vit_ref.Candidate:
    return dataclasses.replace(candidate, call=call)


def made(candidate: vit_ref.Candidate, saved: Callable[[str], Path]) -> Any:
    source = checkpoint.read(saved("rectangular"))
    return port_for(candidate, configuration(source), source)


def traced(candidate: vit_ref.Candidate, saved: Callable[[str], Path], dtype: Any = np.float64) -> dict[str, Any]:
    return made(candidate, saved).trace(IMAGES, dtype)


def test_a_port_that_writes_into_its_images_is_seen(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    def call(model: Any, images: Any) -> Any:
        return model(images.mul_(2).div_(2).add_(1).sub_(0.5))

    for changed in (timm, dataclasses.replace(timm, channels_first=False, sites=None, load=lambda _: Summing())):
        behaviour = check_behaviour(made(calling(changed, call), saved), IMAGES[:2])
        failed = [(each.name, each.reason) for each in behaviour if not each.passed]
        assert failed == [("inputs", "it writes into the images that it is given: it has to copy them")]


class Summing(torch.nn.Module):
    def forward(self, images: Any) -> Any:
        return images.sum((1, 2, 3))[:, None] * torch.ones(23, dtype=images.dtype)


def test_values_are_kept_before_the_port_adds_to_them_in_place(
    timm: vit_ref.Candidate, saved: Callable[[str], Path]
) -> None:
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


def test_a_port_without_gradients_is_judged_forward(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    report = check_port(calling(timm, torch.no_grad()(lambda model, images: model(images))), saved("one-block"))
    assert [check for check in report.checks if check.status == "failed"] == []
    assert report.not_backward == "its output has no gradient: does it run under torch.no_grad?"


def test_frozen_parameters_have_gradients_all_the_same(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    loaded = []

    def load(path: Path) -> Any:
        loaded.append(timm.load(path).requires_grad_(False))
        return loaded[-1]

    port = made(dataclasses.replace(timm, load=load), saved)
    found = {dtype: port.gradients(IMAGES, dtype)(objectives_for(port.config, 5)[0]) for dtype in ("f8", "f4")}
    for path, value in found["f8"].parameters.items():
        # 4e-7 was seen: float32's rounding. That of the key's bias is all there is.
        assert path.endswith("key.bias") or error(found["f4"].parameters[path], value).rms < 1e-5
    # Read once, and left as the person made it.
    (model,) = loaded
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loader_with_a_dtype_computes_in_it(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    def load(path: Path, dtype: np.dtype) -> Any:
        return timm.load(path).to(getattr(torch, dtype.name))

    found = traced(dataclasses.replace(timm, load=load), saved, np.float64)
    expected = traced(timm, saved, np.float64)
    assert all(np.array_equal(found[site], expected[site]) for site in expected)


def test_bfloat16_comes_over_as_it_is(timm: vit_ref.Candidate, saved: Callable[[str], Path]) -> None:
    found, expected = traced(timm, saved, ml_dtypes.bfloat16), traced(timm, saved)
    assert {value.dtype for value in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    # Eight bits of mantissa, rounded a few times: 1e-2 was seen.
    assert 1e-3 < error(found["logits"].astype(np.float64), expected["logits"]).rms < 3e-2


def test_a_port_with_a_tap_shows_its_values_itself(saved: Callable[[str], Path]) -> None:
    source = checkpoint.read(saved("rectangular"))
    own = OwnCandidate(configuration(source), source).trace(IMAGES, np.float64)
    weight, bias = (torch.tensor(source.tensors[f"classifier.{leaf}"]) for leaf in ("weight", "bias"))

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(33, 23)
            self.linear.load_state_dict({"weight": weight, "bias": bias})

        def forward(self, images: Any, tap: Callable) -> Any:
            return self.linear(tap("norm", torch.zeros(len(images), 17, 33, dtype=images.dtype))[:, 0])

    port = port_for(vit_ref.Candidate(load=lambda _: Head()), configuration(source), source)
    found = port.trace(IMAGES, np.float64, replace={"norm": own["norm"]})
    assert not found["norm"].any()
    assert error(found["logits"], own["logits"]).rms < SEMANTIC_RMS


def test_unknown_submodules_and_failures_inside_are_one_line(
    timm: vit_ref.Candidate, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError, match=r"has no submodule 'blocks.0.atn', .*; did you mean 'blocks.0.attn'\?"):
        traced(dataclasses.replace(timm, sites={"blocks.{i}.atn": "block.{i}.attn.out"}), saved)

    def sharing(path: Path) -> Any:
        port: Any = timm.load(path)
        port.blocks[1].attn = port.blocks[0].attn
        return port

    with pytest.raises(InputError, match=r"'blocks.1.attn.*' is the same module as 'blocks.0.attn.*', with its param"):
        traced(dataclasses.replace(timm, load=sharing), saved)
    with pytest.raises(InputError, match="torch_timm: the forward pass raised RuntimeError: Given groups=1") as caught:
        traced(dataclasses.replace(timm, channels_first=False), saved)
    assert "\n" not in str(caught.value)
    sites = {"blocks.{i}.attn.q_norm": ("block.{i}.attn.query", lambda x: x[0, 0, 0, 0, 0])}
    with pytest.raises(InputError, match=r"block.0.attn.query: its selection cannot be applied to a value of shape"):
        traced(dataclasses.replace(timm, sites=sites), saved)


def test_fused_attention_passes_though_it_rounds_many_times_as_much_as_explicit_attention(
    port: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first head all tokens attend to one, with scores of up to 626: half a unit of rounding there is 3e-5."""
    case = Case("sink", dataclasses.replace(CASES["rectangular"].config, num_hidden_layers=1), seed=2)
    tensors, attention = case.checkpoint().tensors, "vit.encoder.layer.0.attention.attention"
    tensors[f"{attention}.query.bias"][0] += 40
    tensors[f"{attention}.key.weight"][0] *= 10
    checkpoint.write_directory(tmp_path, tensors, case.config.to_hf())
    source = checkpoint.read(tmp_path)
    judge = reference_for(case.config, source.tensors)

    def judged(name: str) -> ParityReport:
        candidate = port_for(port(f"torch_timm.py:{name}"), case.config, source)
        return check_gradients("sink", case.config, source, IMAGES[:2], candidate, reference=judge)

    assert judged("candidate").passed
    report = judged("fused")
    assert report.passed
    assert max(result.ratio for result in report.results) > 20
    # One that shows its probabilities computes with them, and has no reason to err like that.
    monkeypatch.setattr(gradients, "_hides_probabilities", lambda *_: False)
    assert max(result.ratio for result in judged("fused").numerical_failures) > 20
