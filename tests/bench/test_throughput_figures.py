"""Are the figures of `pytest --benchmark-only` those of one pass, however many a round queues?"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vit_ref.bench.compiling import Cost
from vit_ref.bench.contenders import Contender
from vit_ref.bench.workload import Workload

WORK = Workload("Ti/16", 8, "float32", "forward")


class Benchmark:
    """Stand-in for pytest-benchmark's fixture with a clock of its own: a pass takes a quarter of a second."""

    def __init__(self) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        self.extra_info: dict[str, Any] = {}

    def __call__(self, run: Any, times: int) -> None:
        self.stats.stats.data += [0.25 * run(times) for _ in range(3)]


@pytest.mark.parametrize("times", [1, 8])
def test_a_pass_is_what_is_timed(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "benchmarks/test_throughput.py"
    spec = importlib.util.spec_from_file_location("throughput", path)
    assert spec and spec.loader
    throughput: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(throughput)
    contender = Contender("vit_ref", lambda times: times, Cost(1.0))
    roofline = SimpleNamespace(measure=lambda: None, flops=lambda: 1e12)
    monkeypatch.setattr(throughput, "passes_at_once", lambda: times)
    monkeypatch.setattr(throughput, "Roofline", lambda numerics: roofline)
    monkeypatch.setattr(throughput, "build_fitting", lambda workload, names, say: (workload, (contender,)))
    benchmark = Benchmark()
    throughput.test_throughput(benchmark, WORK, "vit_ref")
    assert benchmark.stats.stats.data == [0.25] * 3
    assert benchmark.extra_info["images/s"] == 8 / 0.25
    assert benchmark.extra_info["passes at once"] == times
