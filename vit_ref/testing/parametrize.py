"""Turns each check into one pytest case, in your own test suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from vit_ref.errors import InputError
from vit_ref.model.sites import sites
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.report import headline
from vit_ref.verify.results import BEHAVIOURS, CandidateReport
from vit_ref.verify.session import check_port
from vit_ref.verify.vit import gradient_names
from vit_ref.weights.pretrained import open_checkpoint

Given = Candidate | Callable[..., Any] | str
Expected = Mapping[str, str]


def parametrize_with_checks(
    candidate: Given,
    checkpoint: str | os.PathLike[str],
    *,
    expected_failed_checks: Expected | Callable[[Given], Expected] | None = None,
    **options: Any,
) -> Any:
    """Decorates a test that takes `check` and calls it: `def test_port(check): check()`.

    The first case that runs verifies the candidate, once for all cases. Each case then passes, fails with its reason
    and the report's headline, is skipped if its site is not observed, or is an expected failure.

    Args:
      candidate: see `check_port`.
      checkpoint: see `check_port`. Its configuration is read when tests are collected.
      expected_failed_checks: see `check_port`; or a function that takes `candidate` and returns such a mapping.
      **options: further options of `check_port`, but not `quick` or `fail_fast`. By default `cache` is False.

    Raises:
      InputError: the checkpoint cannot be read, or an option leaves checks out.
    """
    import pytest

    for name in ("quick", "fail_fast"):
        if options.get(name):
            raise InputError(
                f"parametrize_with_checks: {name} leaves checks out, and their cases would be skipped as if they did"
                f" not apply: leave out {name}"
            )
    # A test must not depend on what lies on the disk.
    options = {"cache": False, **options}
    selection = {name: options[name] for name in ("revision", "ignore") if name in options}
    _, config = open_checkpoint(checkpoint, **selection)
    names = [f"forward/{site.name}" for site in sites(config, 1)]
    if options.get("backward", True):
        names += [f"backward/{name}" for name in gradient_names(config)]
    names += [f"behaviour/{name}" for name in BEHAVIOURS]
    if expected_failed_checks is not None:
        given = expected_failed_checks
        options["expected_failed_checks"] = given(candidate) if callable(given) else given

    @cache  # it does not keep an exception, so an error is returned and not raised
    def verify() -> CandidateReport | InputError:
        try:
            return check_port(candidate, checkpoint, **options)
        except InputError as error:
            return error

    # Under pytest-xdist one worker runs all cases, so that the candidate is verified once.
    group = pytest.mark.xdist_group(f"{checkpoint} {getattr(candidate, 'name', candidate)}")
    params = [pytest.param(SiteCheck(name, verify), id=name, marks=group) for name in names]
    return pytest.mark.parametrize("check", params)


class SiteCheck:
    """One check of a candidate that is verified when the first case runs.

    Args:
      name: the check's name, as in `results.Check`.
      verify: returns the report, or the error if there is none. It does the work once.
    """

    def __init__(self, name: str, verify: Callable[[], CandidateReport | InputError]):
        self.name = name
        self._verify = verify

    def __call__(self) -> None:
        """Passes, fails, skips, or is an expected failure."""
        import pytest

        report = self._verify()
        if isinstance(report, InputError):
            raise report
        check = {check.name: check for check in report.checks}.get(self.name)
        if check is None:
            backward = self.name.startswith("backward/")
            pytest.skip(report.not_backward if backward else "does not apply to a candidate of this kind")
        elif check.status in ("failed", "stale expectation"):
            parts = {"forward": report.forward, "backward": report.backward}
            part = parts.get(self.name.partition("/")[0])
            context = f"\n\n{headline(part)}" if part else ""
            pytest.fail(f"{check.name}: {check.reason}{context}", pytrace=False)
        elif check.status == "expected failure":
            pytest.xfail(check.reason)
        elif check.status == "not observed":
            pytest.skip(check.reason)
