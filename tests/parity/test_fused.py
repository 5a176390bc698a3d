"""Does the reference's fused attention compute attention, and round as fused kernels do, no less and no more?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.typing import DTypeLike
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from vit_ref.model.attention import Attend, weigh
from vit_ref.verify.gates import error
from vit_ref.verify.references.fused import fused

pytestmark = pytest.mark.optimised

# (batch, tokens, heads, head_dim): no two are equal.
SHAPE = (2, 7, 3, 5)


def heads(sharp: float = 1.0) -> list[NDArray]:
    """Returns query, key, value and the context's cotangent. Scores of the first head are `sharp` times as large."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (rng.normal(size=SHAPE) for _ in range(4))
    query[:, :, 0] *= sharp
    return [query, key, value, cotangent]


def pulled(attend: Attend, given: list[NDArray], dtype: DTypeLike) -> list[NDArray]:
    """Returns the context, and the gradients of query, key and value."""
    with precision_of(dtype).active():
        *arrays, cotangent = (jnp.asarray(x, dtype) for x in given)
        context, pull_back = jax.vjp(attend, *arrays)
        return [np.asarray(x) for x in (context, *pull_back(cotangent))]


@pytest.mark.parametrize("sharp", [1.0, 5.0])
def test_in_float64_it_is_attention(sharp: float) -> None:
    given = heads(sharp)
    for found, right in zip(pulled(fused, given, np.float64), pulled(weigh, given, np.float64), strict=True):
        assert error(found, right).passes_semantic_gate


def test_fused_probabilities_err_by_the_rounded_log_of_their_sum() -> None:
    """Each query attends to one key, so the value's gradient is the context's cotangent, reordered.

    The scores are 1000. Explicit attention computes this gradient exactly. Fused attention loses what the rounding of
    the logarithm loses.
    """
    score = 1000.00001
    query, key = (np.zeros(SHAPE) for _ in range(2))
    query[..., 0] = score * SHAPE[-1] ** 0.5
    key[:, 2, :, 0] = 1.0
    given = [query, key, *heads()[2:]]
    truth, explicit, found = (
        pulled(attend, given, dtype)[3]
        for attend, dtype in ((weigh, np.float64), (weigh, np.float32), (fused, np.float32))
    )
    assert error(explicit, truth).rms < 1e-7
    assert error(found, truth).rms < 1e-7  # the logarithm is the score itself, and rounds as the score does
    # Two keys have one score: the logarithm is larger by log(2), and must be rounded.
    key[:, 3, :, 0] = 1.0
    truth, explicit, found = (
        pulled(attend, given, dtype)[3]
        for attend, dtype in ((weigh, np.float64), (weigh, np.float32), (fused, np.float32))
    )
    rounded = abs(float(np.float32(score) + np.log(2)) - float(np.float32(np.float32(score) + np.log(2))))
    assert error(explicit, truth).rms < 1e-7
    assert error(found, truth).rms == pytest.approx(rounded, rel=0.02)
    assert rounded > 5e-6


def test_fused_probabilities_err_by_scores_that_are_computed_again() -> None:
    """Each query attends to one key, so the logarithm is the score, up to the order in which it is summed.

    The scores are about 1000, of which half a unit of rounding is 3e-5.
    """
    rng = np.random.default_rng(0)
    query, key = rng.uniform(350, 550, SHAPE), np.zeros(SHAPE)
    key[:, 2] = rng.uniform(0.9, 1.1, (2, 3, 5))
    given = [query, key, *heads()[2:]]
    truth, explicit, found = (
        pulled(attend, given, dtype)[3]
        for attend, dtype in ((weigh, np.float64), (weigh, np.float32), (fused, np.float32))
    )
    assert error(explicit, truth).rms < 1e-7
    assert 1e-5 < error(found, truth).rms < 2e-4


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_in_half_precision_scores_and_their_log_are_float32(dtype: type) -> None:
    """A logarithm of eight bits would err by a quarter, and a candidate would be allowed three times that."""
    given = [x.astype(dtype).astype(np.float64) for x in heads(20.0)]
    truth = pulled(weigh, given, np.float64)
    errors = [error(x, right).rms for x, right in zip(pulled(fused, given, dtype), truth, strict=True)]
    assert max(errors) < 2 * float(ml_dtypes.finfo(dtype).eps)


def test_without_gradients_it_is_attention_too() -> None:
    given = heads()[:3]
    with precision_of(np.float64).active():
        arrays = [jnp.asarray(x, np.float64) for x in given]
        assert error(np.asarray(fused(*arrays)), np.asarray(weigh(*arrays))).passes_semantic_gate
