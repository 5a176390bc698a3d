"""Does a candidate repeat its values, for an image alone and in its batch, compiled and uncompiled?"""

from __future__ import annotations

import pytest

from vit_ref.verify.results import Behaviour


def test_behaviour(behaviour: tuple[Behaviour, ...]) -> None:
    wrong = [f"{each.name}: {each.reason}" for each in behaviour if not each.passed]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
