"""What is computed again, or stored anew, although the first time would do."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import vit_ref
from vit_ref.verify import session
from vit_ref.verify.candidates.running import implement, load_in_float64
from vit_ref.verify.candidates.tapped import Tapped
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare import memory
from vit_ref.verify.compare.behaviour import check_behaviour
from vit_ref.verify.precision import FLOAT64, PRECISIONS, Precision

CASE = CASES["rectangular"]


@pytest.fixture
def counted() -> tuple[Any, list[np.dtype], list[Any]]:
    """A candidate, and what it notes: the dtype of each load, and of each call by Python."""
    loads: list[np.dtype] = []
    calls: list[Any] = []

    def load(path: Path | None, dtype: np.dtype) -> Callable[[Any], Any]:
        loads.append(dtype)
        return lambda x: x.sum((1, 2, 3))[:, None] * jnp.ones(CASE.config.num_labels, x.dtype)

    def call(model: Callable[[Any], Any], x: Any) -> Any:
        calls.append(x.dtype)
        return model(x)

    declaration = vit_ref.Candidate(load=load, call=call, sites={}, name="counted")
    loaded = load_in_float64(declaration, None)
    return implement(declaration, ViTOutline(CASE.config), None, loaded), loads, calls


def test_a_candidate_is_loaded_and_traced_once_for_each_dtype(counted: tuple[Any, list, list]) -> None:
    candidate, loads, calls = counted
    for precision in (FLOAT64, PRECISIONS["float32"], FLOAT64, PRECISIONS["float32"]):
        candidate.trace(CASE.images(), precision)
    assert loads == [np.float64, np.float32]
    assert calls == [np.float64, np.float32]


def test_behaviour_compiles_no_tapped_pass_that_the_forward_comparison_compiled(
    counted: tuple[Any, list, list],
) -> None:
    candidate, _, calls = counted
    candidate.trace(CASE.images(), FLOAT64)
    calls.clear()
    assert all(each.passed for each in check_behaviour(candidate, CASE.images()))
    # Two programs, one for the batch and one for a row, and two runs operation by operation, of a row each.
    assert len(calls) == 4


def test_behaviour_runs_no_tapped_pass_that_the_forward_comparison_ran(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[Any] = []
    trace = Tapped.trace

    def noting(self: Any, inputs: Any, precision: Precision, *rest: Any, **named: Any) -> Any:
        traced.append((len(inputs), precision.name))
        return trace(self, inputs, precision, *rest, **named)

    monkeypatch.setattr(Tapped, "trace", noting)
    report = vit_ref.check_port(None, saved("one-block"), backward=False)
    assert traced == [(4, "float64"), (4, "float32")]
    assert [each.name for each in report.behaviour] == ["repeat", "batch", "jit", "untapped"]
    # This session compares five images forward, and runs the behaviour on four of them.
    source, config = session.open_checkpoint(saved("one-block"))
    images = np.concatenate([session.pixels_for(config, None, 4)] * 2)[:5]
    several = session.Session(config, source, images, session.prepare_candidate(None, config, source))
    several.forward()
    traced.clear()
    assert all(each.passed for each in several.behaviour())
    assert traced == [(4, "float64")]


def test_an_output_with_a_tap_that_is_another_fails(counted: tuple[Any, list, list]) -> None:
    candidate, _, _ = counted
    output = candidate.trace(CASE.images(), FLOAT64)[candidate.last]
    assert all(each.passed for each in check_behaviour(candidate, CASE.images(), tapped=output))
    failed = [each.name for each in check_behaviour(candidate, CASE.images(), tapped=2 * output) if not each.passed]
    assert failed == ["untapped"]


_TWICE = """
import resource
import numpy as np
from vit_ref.cli.memory import keep_freed_memory

keep_freed_memory()
np.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory: run it on Linux")
def test_freed_memory_is_used_again() -> None:
    faults = subprocess.run([sys.executable, "-c", _TWICE], capture_output=True, text=True, check=True).stdout
    # Memory from the system has hundreds of pages that are new.
    assert int(faults) < 20


_RETURNED = """
import resource
import numpy as np
from vit_ref.cli.memory import keep_freed_memory
from vit_ref.verify.compare.memory import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

keep_freed_memory()
arrays = [np.ones(500_000) for _ in range(100)]
kept = arrays[::10]
del arrays
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to return memory: run it on Linux")
def test_freed_memory_between_living_arrays_is_returned() -> None:
    returned = subprocess.run([sys.executable, "-c", _RETURNED], capture_output=True, text=True, check=True).stdout
    # 90 of the 100 arrays of 4 MB were freed.
    assert int(returned) > 300e6


def test_memory_is_returned_between_the_steps_of_a_large_problem(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(memory, "return_freed_memory", lambda: order.append("returned"))
    monkeypatch.setattr(memory, "_LARGE", 0)
    source, config = session.open_checkpoint(saved("one-block"))
    candidate = session.prepare_candidate(None, config, source)
    images = session.pixels_for(config, None, 2)
    checked = session.Session(config, source, images, candidate, progress=order.append)
    checked.forward()
    checked.backward()
    steps = [step for step in order if step != "returned"]
    assert len(steps) > 6
    assert order == [each for step in steps for each in ("returned", step)]
    order.clear()
    monkeypatch.setattr(memory, "_LARGE", 2**26)
    checked.forward()
    assert "returned" not in order
