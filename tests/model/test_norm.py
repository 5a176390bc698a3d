"""Is LayerNorm's derivative, which is written out, that of its formula?"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from vit_ref.norm import LayerNorm, layer_norm
from vit_ref.verify.trace import precision_of

pytestmark = pytest.mark.model

EPSILON = 0.3  # As large as the variance, so that a derivative without it shows.


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
    with precision_of(np.float64):
        for found, expected in zip(derivative(written_out), derivative(formula), strict=True):
            # Some roundings of float64 in values of ten and less; the smallest term is a hundredth of them.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_it_computes_in_the_dtype_it_is_asked_for_and_else_in_the_widest() -> None:
    x = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert LayerNorm(3, epsilon=1e-6)(x).dtype == jnp.float32
    assert LayerNorm(3, epsilon=1e-6, param_dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
    assert LayerNorm(3, epsilon=1e-6, dtype=jnp.float32, param_dtype=jnp.bfloat16)(x).dtype == jnp.float32
