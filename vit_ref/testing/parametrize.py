"""One pytest case a check, in the test suite of whoever wrote the port."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from vit_ref.model.sites import sites
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.report import headline
from vit_ref.verify.results import BEHAVIOURS, CandidateReport
from vit_ref.verify.session import check_port
from vit_ref.verify.vit import gradient_names
from vit_ref.weights.pretrained import opened


def parametrize_with_checks(
    candidate: Candidate | Callable[..., Any] | str, checkpoint: str | os.PathLike[str], **options: Any
) -> Any:
    """Decorates a test that takes `check` and calls it: `def test_port(check): check()`.

    The port is judged once, when the first case runs; each case then passes, fails with its reason and the report's
    headline, is skipped where its site is not observed, or is an expected failure.

    Args:
      candidate: see `check_port`.
      checkpoint: see `check_port`; its configuration is read when tests are collected.
      **options: see `check_port`.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    import pytest

    selection = {name: options[name] for name in ("revision", "ignore") if name in options}
    _, config = opened(checkpoint, **selection)
    names = [f"forward/{site.name}" for site in sites(config, 1)]
    if options.get("backward", True):
        names += [f"backward/{name}" for name in gradient_names(config)]
    names += [f"behaviour/{name}" for name in BEHAVIOURS]
    report = cache(lambda: check_port(candidate, checkpoint, **options))
    # Under pytest-xdist one worker takes them all, so that the port is judged once.
    group = pytest.mark.xdist_group(f"{checkpoint} {getattr(candidate, 'name', candidate)}")
    params = [pytest.param(SiteCheck(name, report), id=name, marks=group) for name in names]
    return pytest.mark.parametrize("check", params)


class SiteCheck:
    """One check of a port that is judged when it is first asked for.

    Args:
      name: as in `port_report.Check`.
      report: makes the report, or returns it again.
    """

    def __init__(self, name: str, report: Callable[[], CandidateReport]):
        self.name = name
        self._report = report

    def __call__(self) -> None:
        """Passes, fails, skips or is an expected failure."""
        import pytest

        report = self._report()
        check = {check.name: check for check in report.checks}.get(self.name)
        if check is None:
            backward = self.name.startswith("backward/")
            pytest.skip(report.not_backward if backward else "not asked of a port of this kind")
        elif check.status in ("failed", "stale expectation"):
            parts = {"forward": report.forward, "backward": report.backward}
            part = parts.get(self.name.partition("/")[0])
            context = f"\n\n{headline(part)}" if part else ""
            pytest.fail(f"{check.name}: {check.reason}{context}", pytrace=False)
        elif check.status == "expected failure":
            pytest.xfail(check.reason)
        elif check.status == "not observed":
            pytest.skip(check.reason)
