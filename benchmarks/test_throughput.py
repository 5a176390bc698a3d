"""Forward pass and train step beside FlaxViT, and PyTorch where it is installed: one group, so that ratios show."""

from __future__ import annotations

from typing import Any

import pytest

from vit_ref.bench.measure import compilation, facts, fitting
from vit_ref.bench.roofline import matmul_flops
from vit_ref.bench.workload import Workload
from vit_ref.verify.environment import environment


@pytest.fixture(scope="module")
def roofline(workload: Workload) -> float:
    return matmul_flops(workload)


def test_throughput(benchmark: Any, workload: Workload, name: str, roofline: float) -> None:
    notes: list[str] = []
    fitted, (contender,) = fitting(workload, [name], notes.append)
    benchmark.group = str(fitted)
    benchmark(contender.run)
    compiled = contender.compiled
    benchmark.extra_info.update(
        facts(fitted, benchmark.stats.stats.median, roofline),
        **compilation(
            compiled.cold_s if compiled else contender.cold_s or 0.0,
            compiled.cached_s if compiled else None,
            compiled.flops if compiled else None,
            compiled.bytes if compiled else None,
        ),
        notes=notes,
        environment=environment(),
    )
