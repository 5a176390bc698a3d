"""Forward pass and train step beside FlaxViT, and PyTorch where it is installed: one group, so that ratios show."""

from __future__ import annotations

from typing import Any

from vit_ref.bench.measure import Timing, fitting
from vit_ref.bench.roofline import matmul_flops
from vit_ref.bench.workload import Workload
from vit_ref.verify.environment import environment


def test_throughput(benchmark: Any, workload: Workload, name: str) -> None:
    notes: list[str] = []
    fitted, (contender,) = fitting(workload, [name], notes.append)
    roofline = matmul_flops(fitted.numerics)
    benchmark.group = str(fitted)
    benchmark(contender.run)
    timing = Timing(name, fitted, tuple(benchmark.stats.stats.data), roofline, contender.cost)
    benchmark.extra_info.update(timing.facts(), notes=notes, environment=environment())
