"""Are errors and gates what they are said to be?"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from vit_ref.verify.gates import Error, error, numerical_gate

pytestmark = pytest.mark.parity


def test_errors_are_relative_to_the_truth() -> None:
    truth = np.array([3.0, -4.0])
    found = error(np.array([3.0, -4.5]), truth)
    assert found == Error(rms=0.5 / 5, max=0.5 / 4)
    assert error(10 * np.array([3.0, -4.5]), 10 * truth) == found


def test_errors_do_not_cancel() -> None:
    assert error(np.array([1.0, 3.0]), np.array([2.0, 2.0])).rms == 0.5


def test_errors_against_nothing_are_absolute() -> None:
    assert error(np.array([3e-5, 0.0]), np.zeros(2)).max == 3e-5


@pytest.mark.parametrize("value", [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.array([1.0]), np.ones((1, 2))])
def test_what_cannot_be_compared_is_infinitely_wrong(value: np.ndarray) -> None:
    assert error(value, np.array([1.0, 1.0])) == Error(math.inf, math.inf)


def test_semantic_gate_is_as_stated() -> None:
    assert Error(rms=1e-12, max=1e-11).passes_semantic_gate
    assert not Error(rms=1.01e-12, max=0.0).passes_semantic_gate
    assert not Error(rms=0.0, max=1.01e-11).passes_semantic_gate


@pytest.mark.parametrize(
    ("dtype", "backward", "factor", "unit"),
    [
        (np.float32, False, 2, 2**-23),
        (np.float32, True, 3, 2**-23),
        (ml_dtypes.bfloat16, False, 3, 2**-7),
        (ml_dtypes.bfloat16, True, 3, 2**-7),
        (np.float16, False, 2, 2**-10),
        (np.float16, True, 2, 2**-10),
    ],
)
def test_numerical_gate_follows_the_reference_and_its_precision(
    dtype: type, backward: bool, factor: float, unit: float
) -> None:
    assert numerical_gate(0.0, dtype, backward=backward) == unit
    assert numerical_gate(5.0, dtype, backward=backward) == factor * 5.0 + unit
