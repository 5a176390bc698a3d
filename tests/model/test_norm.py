"""Is LayerNorm's derivative in closed form that of its formula?"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.helpers.precisions import precision_of
from vit_ref.model.norm import LayerNorm, layer_norm

EPSILON = 0.3  # as large as the variance, so that a derivative without it is visible


def formula(x: Array, scale: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return centred / deviation * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def written_out(x: Array, scale: Array, bias: Array) -> Array:
    return layer_norm(x, scale, bias, EPSILON)


def operands(seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, 3, 5))), jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))


def forwards(norm: Callable[..., Array]) -> tuple[Array, ...]:
    return jax.jvp(norm, operands(0), operands(1))


def backwards(norm: Callable[..., Array]) -> tuple[Array, ...]:
    out, back = jax.vjp(norm, *operands(0))
    return (out, *back(operands(2)[0]))


def twice(norm: Callable[..., Array]) -> tuple[Array, ...]:
    return jax.jvp(lambda *at: jax.grad(lambda *at: (norm(*at) ** 3).sum(), (0, 1, 2))(*at), operands(0), operands(1))[
        1
    ]


@pytest.mark.parametrize("derivative", [forwards, backwards, twice])
def test_the_derivative_is_the_formulas(derivative: Callable[[Callable[..., Array]], tuple[Array, ...]]) -> None:
    with precision_of(np.float64).active():
        for found, expected in zip(derivative(written_out), derivative(formula), strict=True):
            # Some roundings of float64 in values of ten and less. The smallest term is a hundredth of them.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_the_way_back_keeps_one_array_of_the_arguments_size() -> None:
    """Counts arrays. Automatic differentiation of the formula would keep three."""
    kept = [leaf.size for leaf in jax.tree.leaves(jax.vjp(written_out, *operands(0))[1])]
    assert sorted(kept) == [5, 6, 30]


@pytest.mark.parametrize(("dtype", "mean", "deviation"), [(jnp.bfloat16, 10, 1), (jnp.float16, 0, 300)])
def test_half_precision_is_rounded_once(dtype: type, mean: float, deviation: float) -> None:
    """Rounds once: means and differences in eight bits err ten times as much, and 300 squared overflows float16."""
    x = jnp.asarray(mean + deviation * np.random.default_rng(0).normal(size=(7, 64)), dtype)
    found = LayerNorm(64, epsilon=1e-6, param_dtype=dtype)(x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    assert found.dtype == dtype
    # Half a unit of the result and, for results near zero, some units of float32 at the mean.
    bound = 0.51 * float(jnp.finfo(dtype).eps) * np.abs(exact) + 8 * 2.0**-23 * (1 + mean / deviation)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound).all()


def test_the_result_has_the_given_dtype_or_else_the_widest() -> None:
    x = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert LayerNorm(3, epsilon=1e-6)(x).dtype == jnp.float32
    assert LayerNorm(3, epsilon=1e-6, dtype=jnp.float32, param_dtype=jnp.bfloat16)(x).dtype == jnp.float32
