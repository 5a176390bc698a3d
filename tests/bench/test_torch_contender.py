"""Does the contender in PyTorch do the same work?"""

from __future__ import annotations

from typing import Any

import pytest

from vit_ref.bench.contenders import CONTENDERS
from vit_ref.bench.workload import Workload
from vit_ref.errors import UnbuildableError
from vit_ref.model import config

torch = pytest.importorskip("torch")
torch_vit = pytest.importorskip("vit_ref.bench.torch_vit")
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config._VARIANTS, "Ti", (48, 2, 96, 3))


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_train_step_learns_its_batch(precision: Any) -> None:
    contender = CONTENDERS["PyTorch"].build(Workload("Ti/112", 2, precision, "train"))
    losses = [float(contender.run()) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.01 and contender.cost.cold_s


def test_as_many_steps_are_taken_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (taken.append(self), step(self))[1])
    contender = CONTENDERS["PyTorch"].build(Workload("Ti/112", 2, "float32", "train"))
    before = len(taken)
    contender.run(3)
    assert len(taken) - before == 3


def test_a_forward_pass_keeps_no_graph_and_has_every_class() -> None:
    logits = CONTENDERS["PyTorch"].build(Workload("Ti/112", 2, "float32", "forward")).run()
    assert logits.shape == (2, 1000) and not logits.requires_grad


def test_the_compiled_one_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    assert CONTENDERS["torch.compile"].build(Workload("Ti/112", 1, "float32", "forward")).name == "torch.compile"
    assert len(compiled) == 1


def test_a_compiler_that_is_missing_is_one_line_and_memory_is_the_callers() -> None:
    message = r"^torch\.compile failed \(no C\+\+ compiler\): install what it needs"
    with pytest.raises(UnbuildableError, match=message), torch_vit._compiling():
        raise RuntimeError("no C++ compiler\nat length")
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"), torch_vit._compiling():
        raise RuntimeError("CUDA out of memory")
