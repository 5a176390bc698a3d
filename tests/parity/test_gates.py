"""Do errors and gates have their stated values?"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import special

from vit_ref.verify.gates import (
    SEMANTIC_RMS,
    Error,
    Truth,
    against,
    apart,
    error,
    errors_of,
    float64_noise,
    numerical_gate,
    pool,
)


def test_errors_are_relative_to_the_truth() -> None:
    truth = np.array([3.0, -4.0])
    found = error(np.array([3.0, -4.5]), truth)
    assert (found.rms, found.max) == (0.5 / 5, 0.5 / 4)
    assert error(10 * np.array([3.0, -4.5]), 10 * truth) == found


def test_errors_can_be_relative_to_a_larger_scale() -> None:
    found = Truth(np.array([3.0, -4.0]), scale=50.0).error(np.array([3.0, -4.5]))
    assert (found.rms, found.max) == pytest.approx((np.sqrt(0.125) / 50, 0.5 / 50))
    # The scale lies between the truth's root mean square and its largest element, so each error has its own.
    found = Truth(np.array([0.0, 4.0]), scale=3.0).error(np.array([0.0, 3.0]))
    assert (found.rms, found.max) == pytest.approx((np.sqrt(0.5) / 3, 0.25))


def test_carriers_count_the_elements_that_carry_an_error() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=100_000)
    # The fourth moment of so many normal numbers is known to 1.3 %, three standard deviations to 4 %.
    assert error(noise, np.zeros_like(noise), carriers=True).carriers == pytest.approx(noise.size, rel=0.04)
    # A heavier tail: the fourth moment of Laplace's distribution is six times the square of the second.
    heavy = rng.laplace(size=1_000_000)
    assert error(heavy, np.zeros_like(heavy), carriers=True).carriers == pytest.approx(heavy.size / 2, rel=0.05)
    few = np.where(np.arange(noise.size) % 1000 == 0, 1e-200, 0.0)
    # 100 equal elements have no tail at all.
    assert error(few, np.zeros_like(few), carriers=True).carriers == pytest.approx(300)
    assert error(np.ones(7), np.ones(7), carriers=True).carriers == 7
    one = np.zeros(50)
    one[3] = 1.0
    assert error(one, np.zeros(50), carriers=True).carriers == 3


def test_carriers_are_counted_only_on_request() -> None:
    assert error(np.ones(7), np.zeros(7)).carriers == 0
    assert Truth(np.zeros(7)).error(np.ones(7)).carriers == 0


def test_errors_cover_the_found_values_in_order() -> None:
    truths = {name: Truth(np.ones(7)) for name in "abc"}
    found = {name: np.full(7, 1.5) for name in "cad"}
    assert list(errors_of(found, truths).items()) == [("a", Error(0.5, 0.5, 0.0)), ("c", Error(0.5, 0.5, 0.0))]
    assert errors_of(found, truths, carriers=True)["c"].carriers == 7


def test_a_tokens_channels_count_as_one_carrier() -> None:
    tokens = np.ones((2, 3, 5))
    assert error(tokens, np.zeros_like(tokens), carriers=True).carriers == pytest.approx(6)
    tokens[1, 2] = 1e3
    assert error(tokens, np.zeros_like(tokens), carriers=True).carriers == pytest.approx(1, rel=1e-4)
    one_key = np.zeros((2, 3, 7, 7))
    one_key[..., 0] = 1.0
    # Every query carries a part.
    assert error(one_key, np.zeros_like(one_key), carriers=True).carriers == pytest.approx(14)
    # The count for outputs lies between the number of images and the number of elements.
    assert error(np.ones((2, 18)), np.zeros((2, 18)), carriers=True).carriers == pytest.approx(np.sqrt(2 * 36))
    one_logit = np.eye(2, 3) * [1, 0, 0]
    assert error(one_logit, np.zeros((2, 3)), carriers=True).carriers == pytest.approx(np.sqrt(1 * 3))
    uneven = np.array([[[1.0], [0.5]]])
    assert error(uneven, np.zeros_like(uneven), carriers=True).carriers == pytest.approx(1.25**2 / (1 + 0.25**2))
    # Tokens are counted where heads come after them, as in a query, and before them, as in the probabilities.
    for shape in ((2, 7, 3, 5), (2, 3, 7, 7)):
        assert error(np.ones(shape), np.zeros(shape), carriers=True).carriers == pytest.approx(14)


@pytest.mark.parametrize("shape", [(), (1,), (70_001,), (3, 40_000), (2, 70, 3, 400), (2, 3, 40_000)])
def test_an_array_measured_in_parts_has_the_error_of_the_whole(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=shape)
    off = rng.normal(size=shape)
    found = error(truth + off, truth, carriers=True)
    assert found.rms == pytest.approx(np.sqrt(np.mean(np.square(off)) / np.mean(np.square(truth))), rel=1e-9)
    assert found.max == pytest.approx(np.abs(off).max() / np.abs(truth).max(), rel=1e-9)
    squares = np.square(off)
    elements = min(off.size, 3 * squares.sum() ** 2 / np.square(squares).sum())
    each = [squares.sum(axis=axes) for axes in {2: [1], 3: [2], 4: [(2, 3), (1, 3)]}.get(len(shape), [])]
    parts = max((float(sums.sum() ** 2 / np.square(sums).sum()) for sums in each), default=elements)
    expected = np.sqrt(elements * parts) if len(shape) == 2 else parts
    assert found.carriers == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_error_does_not_depend_on_the_order_of_axes_in_memory(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(3, 400, 101))
    value = (truth * (1 + 1e-3 * rng.normal(size=truth.shape))).astype(dtype)
    expected = np.sqrt(np.mean(np.square(value.astype(np.float64) - truth)) / np.mean(np.square(truth)))
    for theirs in (value, np.asfortranarray(value)):
        for right in (truth, np.asfortranarray(truth)):
            assert error(theirs, right).rms == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("where", [0, 69_999, 70_000])
def test_a_part_that_is_not_finite_makes_the_error_infinite(where: int) -> None:
    value = np.ones(70_001, np.float32)
    value[where] = np.nan
    assert error(value, np.ones(70_001)) == Error(math.inf, math.inf, reason="not finite")


def test_errors_do_not_cancel() -> None:
    assert error(np.array([1.0, 3.0]), np.array([2.0, 2.0])).rms == 0.5


@pytest.mark.parametrize("shape", [(0,), (1, 0, 12), (0, 7)])
def test_a_value_without_elements_has_no_error_but_a_shape(shape: tuple[int, ...]) -> None:
    truth = Truth(np.zeros(shape))
    assert truth.finite
    assert truth.error(np.zeros(shape, np.float32), carriers=True)[:2] == (0.0, 0.0)
    assert truth.error(np.zeros((*shape, 1))).reason == f"wrong shape {(*shape, 1)}, not {shape}"


def test_errors_against_zeros_are_absolute() -> None:
    assert error(np.array([3e-5, 0.0]), np.zeros(2)).max == 3e-5


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([1.0, np.nan]), "not finite"),
        (np.array([1.0, np.inf]), "not finite"),
        (np.ones(1), "wrong shape (1,), not (2,)"),
        (np.ones(3), "wrong shape (3,), not (2,)"),
        (np.ones((1, 2)), "wrong shape (1, 2), not (2,)"),
        (np.full((2, 1), np.nan), "wrong shape (2, 1), not (2,)"),
    ],
)
def test_an_incomparable_value_has_an_infinite_error_and_reason(value: np.ndarray, reason: str) -> None:
    assert error(value, np.array([1.0, 1.0])) == Error(math.inf, math.inf, reason=reason)
    assert error(np.ones(2), np.array([1.0, 1.0])).reason == ""


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [
        (2e-6, 1e-6, "2.0e-06, gate 1e-06"),
        (5.6e-7, 1e-12, "5.6e-07, gate 1e-12"),
        (1.93e-6, 1.87e-6, "1.93e-06, gate 1.87e-06"),
        (1.90004e-6, 1.9e-6, "1.90004e-06, gate 1.90000e-06"),
        (9.96e-7, 1e-6, "9.96e-07, gate 1.00e-06"),
        (1.0, np.nextafter(1.0, 0), "1.000000000000000e+00, gate 9.999999999999999e-01"),
        (1.9e-6, 1.9e-6, "1.9e-06, gate 1.9e-06"),
        (math.inf, 1e-12, "inf, gate 1e-12"),
        (math.inf, math.inf, "inf, gate inf"),
        (math.nan, 1e-12, "nan, gate 1e-12"),
    ],
)
def test_an_error_and_its_gate_are_printed_differently(value: float, limit: float, said: str) -> None:
    assert against(value, limit) == said


def test_a_margin_below_one_never_reads_as_one() -> None:
    assert [apart(margin, 1.0, 2, "g")[0] for margin in (0.9697, 0.9997, 1.0, 1.04, 36.0)] == [
        "0.97",
        "0.9997",
        "1",
        "1.04",
        "36",
    ]


def test_the_semantic_gate_has_its_stated_bounds() -> None:
    assert Error(rms=0.0, max=0.0).passes_semantic_gate
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
    assert numerical_gate(0.0, dtype, 100, backward=backward) == unit
    assert numerical_gate(5.0, dtype, 100, backward=backward) == factor * 5.0 + unit


@pytest.mark.parametrize(
    ("dtype", "factor"), [(np.float32, 4), (ml_dtypes.bfloat16, 3), (np.float16, 2)], ids=["f4", "bf16", "f2"]
)
def test_a_reference_outside_xla_widens_the_gate_in_float32(dtype: type, factor: float) -> None:
    gate = numerical_gate(5.0, dtype, 100, foreign=True)
    assert gate == factor * 5.0 + float(ml_dtypes.finfo(dtype).eps)
    assert numerical_gate(5.0, np.float32, 100, backward=True, foreign=True) == 6 * 5.0 + 2**-23


@pytest.mark.parametrize("carriers", [1, 3, 10, 40])
def test_an_error_of_few_elements_fails_once_in_a_million(carriers: int) -> None:
    factor = numerical_gate(1.0, np.float32, carriers) - 2**-23
    assert factor > 2
    # Checked with scipy.special's inverse function.
    assert special.fdtrc(carriers, carriers, factor**2) == pytest.approx(1e-6, rel=1e-6)
    assert numerical_gate(1.0, np.float32, 2 * carriers) < factor + 2**-23


def test_noise_is_float32s_rounding_moved_to_float64() -> None:
    # A hundred units of rounding are an error as in any deep model.
    assert float64_noise(100 * 2**-23) == pytest.approx(3200 * 2**-52, rel=1e-12, abs=0)
    assert float64_noise(100 * 2**-23) < SEMANTIC_RMS
    assert float64_noise(math.inf) == 0


def test_noise_widens_both_bounds() -> None:
    assert Error(9e-10, 9e-9, noise=1e-9).passes_semantic_gate
    assert not Error(2e-9, 2e-9, noise=1e-9).passes_semantic_gate
    assert not Error(9e-10, 2e-8, noise=1e-9).passes_semantic_gate
    assert not Error(2e-12, 2e-12, noise=1e-13).passes_semantic_gate


def test_pooled_errors_are_those_of_one_batch() -> None:
    shape, rng = (2, 40, 3), np.random.default_rng(0)
    # Runs err unevenly, and one token more than the others.
    runs = [rng.normal(size=shape) * size for size in (1.0, 0.1, 7.0)]
    runs[1][1, 3] *= 1e3
    truth = rng.normal(size=shape)
    scale = np.concatenate([truth] * 3)
    expected = error(scale + np.concatenate(runs), scale, carriers=True)
    found = pool([error(truth + run, truth, carriers=True) for run in runs])
    assert found[:3] == pytest.approx(expected[:3], rel=1e-9)


def test_pooled_errors_of_nothing_and_of_what_is_not_finite() -> None:
    assert pool([Error(0.0, 0.0, 7.0)] * 2) == Error(0.0, 0.0, 14.0)
    beyond = Error(math.inf, math.inf, reason="not finite")
    assert pool([Error(1e-3, 1e-3, 7.0), beyond]) is beyond
