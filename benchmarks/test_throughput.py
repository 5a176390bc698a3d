"""Forward pass and train step beside FlaxViT, and PyTorch where it is installed: one group, so that ratios show."""

from __future__ import annotations

from typing import Any

import pytest

from vit_ref.bench.measure import Timing, build_fitting
from vit_ref.bench.queueing import passes_at_once
from vit_ref.bench.roofline import Roofline
from vit_ref.bench.workload import Workload
from vit_ref.errors import UnbuildableError
from vit_ref.verify.environment import environment

# Rounds of the roofline's products before, and again after, what pytest-benchmark times without a break.
PRODUCTS = 4


# PyTorch's compiler imports what PyTorch itself calls deprecated, and a warning is an error here.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_throughput(benchmark: Any, workload: Workload, name: str) -> None:
    notes: list[str] = []
    roofline = Roofline(workload.numerics)  # before the contender: what fits has to fit beside it
    try:
        fitted, (contender,) = build_fitting(workload, [name], notes.append)
    except UnbuildableError as error:
        pytest.skip(str(error))
    benchmark.group = str(fitted)
    for _ in range(PRODUCTS):
        roofline.measure()
    times = passes_at_once()
    benchmark(contender.run, times)
    # Seconds of a pass in its own columns too, however many a round has: saved runs stay comparable.
    rounds = benchmark.stats.stats.data
    rounds[:] = [seconds / times for seconds in rounds]
    for _ in range(PRODUCTS):
        roofline.measure()
    timing = Timing(name, fitted, tuple(rounds), times, roofline.flops(), contender.cost)
    benchmark.extra_info.update(timing.facts(), notes=notes, environment=environment())
