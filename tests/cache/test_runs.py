"""Is a report the same without a cache, with an empty one and with a full one, and does a full one save the work?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest
from flax import linen

from vit_ref.errors import OraclesDifferError
from vit_ref.verify import session
from vit_ref.verify.cache import originals
from vit_ref.verify.cache.reference import KeptReference
from vit_ref.verify.cache.shelf import Shelf
from vit_ref.verify.cache.store import Store
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.precision import PRECISIONS
from vit_ref.verify.references import choice
from vit_ref.verify.references.flax_vit import FlaxViTReference
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.report import to_json
from vit_ref.verify.session import check_port

CANDIDATE = str(Path(__file__).parents[1] / "candidates" / "worked" / "nnx_tutorial.py")
# One block and few tokens, because the gradients are compiled.
WRONG = f"{CANDIDATE}:wrong_gelu"
CASE = Case("one-block", replace(CASES["rectangular"].config, num_hidden_layers=1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.write(tmp_path_factory.mktemp("given") / "one-block").path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIT_REF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "entries"


def report(checkpoint: Path, **options: Any) -> str:
    return json.dumps(to_json(check_port(None, checkpoint, **options)))


def count(place: Path, kind: str) -> int:
    return len(list(place.glob(f"{kind}-*")))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Returns what was done since the last call: building a reference, and the oracle's traces."""
    done: list[str] = []
    reference_for, trace = session.reference_for, NumpyOracle.trace

    def counting(*arguments: Any) -> Any:
        done.append("reference")
        return reference_for(*arguments)

    def tracing(*arguments: Any, **named: Any) -> Any:
        done.append("oracle")
        return trace(*arguments, **named)

    monkeypatch.setattr(session, "reference_for", counting)
    monkeypatch.setattr(NumpyOracle, "trace", tracing)

    def since() -> list[str]:
        found = sorted(done)
        done.clear()
        return found

    return since


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16", "backward": False}], ids=["float32", "bfloat16"])
def test_a_report_does_not_depend_on_the_cache(checkpoint, place, built, options) -> None:
    without = report(checkpoint, cache=False, **options)
    assert not place.exists()
    built()
    empty = report(checkpoint, **options)
    assert built() == ["oracle", "reference"]
    assert (count(place, "errors") > 1, count(place, "traces") > 0) == (True, True)
    full = report(checkpoint, **options)
    assert built() == []
    assert without == empty == full


def test_a_damaged_entry_is_computed_again(checkpoint, place, built) -> None:
    options = {"backward": False}
    empty = report(checkpoint, **options)
    built()
    for entry in place.iterdir():
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    assert report(checkpoint, **options) == empty
    assert built() == ["oracle", "reference"]
    assert report(checkpoint, **options) == empty
    assert built() == []


def test_results_of_replaced_functions_are_not_kept(checkpoint, place, built, monkeypatch, caplog) -> None:
    originals.remember()
    with monkeypatch.context() as replacing:
        replacing.setattr(jax.nn, "silu", lambda x: x)
        report(checkpoint, backward=False)
    assert [count(place, kind) for kind in ("traces", "errors", "facts")] == [0, 0, 0]
    assert "jax.nn.silu changed in this run" in caplog.text
    report(checkpoint, backward=False)
    assert count(place, "traces") > 0


def test_a_replaced_method_is_found(monkeypatch) -> None:
    originals.remember()
    assert originals.find_replaced() == ""
    monkeypatch.setattr(linen.LayerNorm, "__call__", lambda *arguments: 0)
    assert originals.find_replaced() == "flax.linen.normalization.LayerNorm.__call__"


def wrong(trace: Callable[..., Any]) -> Callable[..., Any]:
    def off(self: Any, pixels: Any, precision: Any) -> Any:
        return {site: value * 1.001 for site, value in trace(self, pixels, precision).items()}

    return off


def test_a_wrong_reference_does_not_stay(checkpoint, place, monkeypatch) -> None:
    with monkeypatch.context() as replacing:
        replacing.setattr(FlaxViTReference, "trace", wrong(FlaxViTReference.trace))
        with pytest.raises(OraclesDifferError):
            report(checkpoint, backward=False)
    assert '"passed": true' in report(checkpoint, backward=False)


def test_the_oracles_earlier_agreement_counts_for_the_trace_it_saw(checkpoint, place, monkeypatch) -> None:
    report(checkpoint, backward=False)
    for entry in place.glob("traces-*"):
        entry.unlink()
    monkeypatch.setattr(FlaxViTReference, "trace", wrong(FlaxViTReference.trace))
    with pytest.raises(OraclesDifferError):
        report(checkpoint, backward=False)


def test_a_second_run_of_a_candidate_of_others_builds_no_reference(checkpoint, place, built) -> None:
    first = to_json(check_port(CANDIDATE, checkpoint, backward=False))
    assert built() == ["oracle", "reference"]
    assert to_json(check_port(CANDIDATE, checkpoint, backward=False)) == first
    assert built() == []


def test_a_second_run_that_ends_at_a_wrong_formula_imports_no_reference(checkpoint, place, built, monkeypatch) -> None:
    first = to_json(check_port(WRONG, checkpoint, fail_fast=True))
    assert built() == ["oracle", "reference"]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("transformers", "torch")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises an error now
    assert to_json(check_port(WRONG, checkpoint, fail_fast=True)) == first
    assert built() == []


def test_a_reference_that_is_imported_late_is_kept(checkpoint, place, built, monkeypatch) -> None:
    """The values are known of a wrong candidate. A right one needs the reference in the tested precision."""
    check_port(WRONG, checkpoint, fail_fast=True)
    late: list[str] = []
    remember_after = originals.remember_after
    monkeypatch.setattr(originals, "remember_after", lambda load: late.append("late") or remember_after(load))
    for times in (["reference"], []):
        built()
        late.clear()
        assert check_port(CANDIDATE, checkpoint, backward=False, fail_fast=True).passed
        assert built() == times and len(late) == len(times)


LATE = "transformers.models.vit.late"


def import_late(name: str = LATE) -> None:
    sys.modules[name] = ModuleType(name)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the late module after the test."""
    monkeypatch.setitem(sys.modules, LATE, None)
    monkeypatch.delitem(sys.modules, LATE)
    originals.remember()


def test_what_is_imported_after_an_innocent_candidate_is_remembered(late) -> None:
    originals.remember_after(import_late)
    assert originals.find_replaced() == ""


def test_what_is_imported_after_a_candidate_that_replaced_something_is_not(late, monkeypatch) -> None:
    with monkeypatch.context() as replacing:
        replacing.setattr(jax.nn, "silu", abs)
        originals.remember_after(import_late)
    assert originals.find_replaced() == LATE


def test_what_a_candidate_imported_itself_is_not_remembered(late, monkeypatch) -> None:
    monkeypatch.setattr(originals, "_late", {"transformers": sys.modules["transformers"].__file__})
    originals.remember_after(import_late)
    assert originals.find_replaced() == LATE


def test_a_package_from_another_place_is_found(late, monkeypatch) -> None:
    monkeypatch.setattr(originals, "_late", {"transformers": "/elsewhere/transformers/__init__.py"})
    assert originals.find_replaced() == "transformers"
    assert originals.find_replaced(foreign=False) == ""


def test_a_package_that_is_not_imported_yet_is_found_where_it_lies(monkeypatch) -> None:
    file = sys.modules["transformers"].__file__
    monkeypatch.delitem(sys.modules, "transformers")
    originals.remember()
    assert originals._late["transformers"] == file


def test_a_module_that_a_candidate_may_have_changed_is_found(monkeypatch) -> None:
    originals.remember()
    monkeypatch.setitem(sys.modules, "transformers.models.vit.late", ModuleType("late"))
    assert originals.find_replaced(foreign=True) == "transformers.models.vit.late"
    assert originals.find_replaced(foreign=False) == ""


def test_an_activation_by_name_that_was_replaced_is_found(monkeypatch) -> None:
    from transformers import modeling_flax_utils

    originals.remember()
    monkeypatch.setitem(modeling_flax_utils.ACT2FN, "gelu", abs)
    assert originals.find_replaced() == "transformers.modeling_flax_utils.ACT2FN['gelu']"


def test_nothing_is_kept_after_a_setting_changed(checkpoint, place) -> None:
    with session.opened(True) as store:
        shelf = Shelf.of(store, "flax", "a configuration", {})
        with jax.default_matmul_precision("bfloat16"):
            shelf.keep_fact("changed", 1)
        shelf.keep_fact("the same", 1)
    assert (shelf.find_fact("changed"), shelf.find_fact("the same")) == (None, 1)


def test_other_weights_are_computed(checkpoint, place, built, tmp_path) -> None:
    report(checkpoint, backward=False)
    built()
    other = replace(CASE, seed=77).write(tmp_path / "other").path
    report(other, backward=False)
    assert built() == ["oracle", "reference"]


def test_fused_attention_reaches_the_reference(place) -> None:
    class Plain:
        name, foreign, fused = "plain", False, False

        def gradients(self, inputs: Any, precision: Any) -> bool:
            return self.fused

    kept: Any = KeptReference(Shelf(Store(place.parent), "an identity"), Plain)
    tested = PRECISIONS["float32"]
    assert choice.with_fused_attention(kept).gradients(CASE.images(), tested) is True
    assert kept.gradients(CASE.images(), tested) is False


def test_a_reference_that_is_given_whole_is_not_kept(checkpoint, place) -> None:
    source, config = session.open_checkpoint(checkpoint)
    given = choice.reference_for(config, session.hf_tensors(config, source))
    own = session.prepare_candidate(None, config, source)
    with session.opened(True) as store:
        shelf = Shelf.of(store, "flax", repr(config), session.hf_tensors(config, source))
        made = session.Session(config, source, CASE.images(), own, reference=given, shelf=shelf)
        made.forward()
    assert (count(place, "traces"), count(place, "errors")) == (0, 0)


def test_off_keeps_nothing(checkpoint, place, monkeypatch) -> None:
    monkeypatch.setenv("VIT_REF_CACHE", "off")
    report(checkpoint, backward=False)
    assert not place.exists()


def test_a_setting_of_pytorchs_products_is_found() -> None:
    torch = pytest.importorskip("torch")
    originals.remember()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert originals.find_replaced(foreign=False) == "torch.get_float32_matmul_precision"
    finally:
        torch.set_float32_matmul_precision(before)
    assert originals.find_replaced(foreign=False) == ""


def test_what_a_candidate_imported_is_not_the_original_for_the_next_one(monkeypatch) -> None:
    monkeypatch.setattr(originals, "_originals", {})
    monkeypatch.setattr(originals, "_late", {"transformers": None})  # it was not imported when the first one was loaded
    monkeypatch.setitem(sys.modules, LATE, ModuleType(LATE))
    originals.remember()
    assert not [name for name in originals._originals if name.startswith("transformers")]
    originals.remember_after(lambda: None)
    assert originals.find_replaced().startswith("transformers")


def test_the_seed_that_pytorchs_compiler_wraps_is_no_replaced_function(monkeypatch) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    originals.remember()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    assert originals.find_replaced(foreign=False) == ""
    monkeypatch.setattr(torch, "matmul", lambda *operands: None)
    assert originals.find_replaced(foreign=False) == "torch.matmul"
