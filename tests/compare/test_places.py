"""Does the report say which part of a value is wrong?"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.diagnose.places import find_place

TRUTH = np.random.default_rng(0).normal(size=(2, 3, 9, 10))
PLACES: list[tuple[tuple[object, ...], str]] = [
    ((slice(None), slice(None), slice(7, 9)), "only at 7 to 8 of 9 along axis 2"),
    (
        (1, slice(None), slice(None), [0, 1, 3, 5, 7, 9]),
        "only at 1 of 2 along axis 0; 0 to 1, 3, 5, ... of 10 along axis 3",
    ),
    ((), ""),
]


@pytest.mark.parametrize(("part", "place"), PLACES)
def test_the_wrong_indices_are_named(part: tuple[object, ...], place: str) -> None:
    value = TRUTH.copy()
    value[part] += 1
    assert find_place(value, TRUTH) == place


def bordered(width: int) -> NDArray:
    value = TRUTH + 1
    value[:, :, width:-width, width:-width] -= 1
    return value


def test_errors_along_the_border_of_an_image_are_named() -> None:
    assert find_place(bordered(2), TRUTH) == "only within 2 of the border"
    assert find_place(bordered(3), TRUTH) == ""
    assert find_place(bordered(1)[0], TRUTH[0]) == ""
