"""How fast are forward pass and training step beside FlaxViT and PyTorch? They are one group, to show ratios."""

from __future__ import annotations

from typing import Any

import pytest

from vit_ref.bench.measure import Timing, build_fitting
from vit_ref.bench.queueing import passes_at_once
from vit_ref.bench.roofline import Roofline
from vit_ref.bench.workload import Workload
from vit_ref.errors import UnbuildableError
from vit_ref.verify.environment import environment

# Number of rounds of the roofline's products before, and again after, the timed rounds.
PRODUCTS = 4


# PyTorch's compiler imports modules that PyTorch calls deprecated, and a warning is an error here.
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
    # Seconds of one pass in its own columns, so that saved runs with other numbers of passes stay comparable.
    rounds = benchmark.stats.stats.data
    rounds[:] = [seconds / times for seconds in rounds]
    for _ in range(PRODUCTS):
        roofline.measure()
    timing = Timing(name, fitted, tuple(rounds), times, roofline.flops(), contender.cost)
    benchmark.extra_info.update(timing.facts(), notes=notes, environment=environment())
