"""Does a failing property print how to make it fail again?"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings

from tests.helpers.vit_strategies import configs, seeds
from vit_ref.model.config import ViTConfig

profiles = pytest.mark.parametrize("profile", ["quick", "ci", "thorough"])


@profiles
def test_a_failing_example_is_printed_as_code_to_paste(profile: str) -> None:
    drawn: list[dict[str, object]] = []

    @settings(settings.get_profile(profile), database=None)
    @given(config=configs(), seed=seeds)
    def failing(**example: object) -> None:
        drawn.append(example)
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        failing()
    printed = "\n".join(caught.value.__notes__)
    code = re.search(r"^.*?(failing\(.*?^\))", printed, re.DOTALL | re.MULTILINE)
    assert code, printed
    assert eval(code[1], {"failing": dict, "ViTConfig": ViTConfig}) == drawn[-1]
    assert "@reproduce_failure(" in printed


@profiles
def test_draws_differ_from_run_to_run_and_may_take_their_time(profile: str) -> None:
    """Runs as in CI, where hypothesis would otherwise fix the draws."""
    found = settings.get_profile(profile)
    assert (found.derandomize, found.deadline) == (False, None)
