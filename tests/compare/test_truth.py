"""Is a reference that is the only truth checked as far as possible?"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vit_ref
from tests.compare import sides
from vit_ref.errors import CheckpointError, InputError, UnjudgedError
from vit_ref.verify.pairs import pretrained
from vit_ref.verify.pairs.truth import note_constants, require_same_attention

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
forgetting = pytest.importorskip("vit_ref.verify.candidates.torch_casts").forgetting
torch_side = pytest.importorskip("tests.compare.torch_side")
pytestmark = pytest.mark.torch


class Attending:
    """Stand-in for a model of transformers that has one attention, and can be set to another."""

    def __init__(self, own: str = "sdpa", off: float = 0.0):
        self.config, self.off = SimpleNamespace(_attn_implementation=own), off

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


def run(model: Attending) -> Any:
    """Returns an output that depends on the attention by `off`."""
    return torch.ones(2, 3, dtype=torch.float64).numpy() + (
        model.off if model.config._attn_implementation == "eager" else 0
    )


def test_both_ways_of_attention_are_run_and_named() -> None:
    model = Attending()
    assert "sdpa and eager attention agree in float64" in require_same_attention("theirs", model, run(model), run)
    assert model.config._attn_implementation == "sdpa"


def test_a_reference_whose_ways_of_attention_differ_is_refused() -> None:
    with pytest.raises(
        UnjudgedError, match=r"theirs: its sdpa and its eager attention differ in float64 at output by 1\.0e-08"
    ):
        require_same_attention("theirs", Attending(off=1e-8), run(Attending()), run)


def test_a_model_with_other_attention_or_none_is_not_changed() -> None:
    assert require_same_attention("theirs", Attending("flash_attention_2"), run(Attending()), run) == ""
    assert require_same_attention("theirs", torch.nn.Linear(2, 3), run(Attending()), run) == ""


class Narrow(torch_side.Model):
    """A model that casts to float32 by design, makes numbers in it, and holds a rounded constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((), 1 / 3), persistent=False)

    def forward(self, ids: Any, features: Any) -> Any:
        steps = torch.arange(0.1, 0.4, 0.1, dtype=torch.float32)[:1]
        output = super().forward(ids, features)
        return output.float().to(output.dtype) * self.table + steps


def test_casts_of_the_reference_are_undone_and_named() -> None:
    def twin(checkpoint: Any, dtype: Any) -> Any:
        forward, weights = sides.function().load(checkpoint)

        def scaled(w: Any, ids: Any, features: Any) -> Any:
            return forward(w, ids, features) * w["table"] + 0.1

        return scaled, {name: x.astype(dtype) for name, x in weights.items()} | {
            "table": np.float32(1 / 3) * np.ones((), dtype)
        }

    report = vit_ref.compare(torch_side.reference(Narrow), vit_ref.Candidate(load=twin), backward=False)
    assert not report.forward.semantic_failures
    notes = " ".join(report.notes)
    assert "the reference makes 2 casts from float64 to float32" in notes
    assert "constants that the reference computed when it was made are part of the truth: table" in notes


def test_caches_are_emptied_of_a_model_inside_a_persons_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("library.models.vit")
    exec("from functools import cache\npositions = cache(lambda size: object())", vars(library))
    library.positions.__wrapped__.__module__ = library.positions.__module__ = library.__name__
    monkeypatch.setitem(sys.modules, library.__name__, library)
    inner = type("Model", (torch.nn.Module,), {"__module__": library.__name__})()
    for module in (inner, torch.nn.Sequential(inner)):
        before = library.positions(3)
        with forgetting(module):
            assert library.positions(3) is not before


def test_a_reference_with_live_dropout_is_refused() -> None:
    class Live(torch_side.Model):
        def forward(self, ids: Any, features: Any) -> Any:
            return torch.nn.functional.dropout(super().forward(ids, features), training=True)

    with pytest.raises(InputError, match=r"torch: two runs on the same inputs differ"):
        vit_ref.compare(torch_side.reference(Live), sides.function(), backward=False)


def test_constants_that_are_saved_are_weights() -> None:
    model = torch.nn.BatchNorm1d(3)
    assert note_constants(model) == "" == note_constants(object())


@pytest.mark.parametrize("refusal", [ValueError("not supported"), ImportError("not installed"), None])
def test_a_model_that_keeps_its_attention_is_compared_with_none(refusal: Exception | None) -> None:
    class Keeping(Attending):
        def set_attn_implementation(self, name: str) -> None:
            if refusal is not None:
                raise refusal

    assert require_same_attention("theirs", Keeping(off=1.0), run(Attending()), run) == ""


def test_an_unknown_model_of_transformers_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CheckpointError, match=r"transformers cannot load a model of model_type 'no-such-model'"):
        pretrained.load(tmp_path)
