"""What does verification cost, cold, by pass? Each runs in a process of its own, for time and peak memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

# A new process has compiled nothing, and its peak memory belongs to this pass alone.
_CHECK = """
import resource, sys
import numpy as np
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import Case
from vit_ref.verify.session import Session

size, passes = sys.argv[1:]
case = Case(size, ViTConfig.variant(size, num_labels=10), batch=1)
source, pixels = case.checkpoint(), case.images()
session = Session(case.config, source, pixels, OwnCandidate(case.config, source), title=size)
for name in passes.split("+"):
    report = {"forward": session.forward, "backward": session.backward}[name]()
    assert report.passed, report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.benchmark(group="verification, float64 and float32, cold")
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_verification(benchmark: Any, passes: str, request: pytest.FixtureRequest) -> None:
    size = (request.config.getoption("size") or ["Ti/16"])[0]
    command = [sys.executable, "-c", _CHECK, size, passes]
    result = benchmark.pedantic(
        subprocess.run, (command,), {"check": True, "capture_output": True, "text": True}, rounds=1
    )
    benchmark.extra_info.update({"size": size, "peak bytes": int(result.stdout.split()[-1])})
