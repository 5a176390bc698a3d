"""LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450), with its derivative in closed form."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from vit_ref.model.attention import at_least_float32


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalises each row to mean 0 and deviation 1, then scales and shifts it; `torch.nn.LayerNorm`.

    It computes the variance of the centred row. flax's default, E[x^2] - E[x]^2, loses mean^2 / variance units of
    rounding and can become negative.

    Args:
      x: (..., D).
      scale: (D,), of x's dtype.
      bias: (D,), of x's dtype.
      epsilon: number added to the variance.

    Returns:
      (..., D), computed in x's dtype.
    """
    mean, reciprocal = _moments(x, epsilon)
    return _over_rows((x - mean) * reciprocal, scale, bias)


@layer_norm.defjvp
def _layer_norm_jvp(
    epsilon: float, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # Automatic differentiation would make a longer formula, which XLA compiles into more passes over memory.
    x, scale, bias = primals
    x_dot, scale_dot, bias_dot = tangents
    # The barrier keeps XLA from computing the moments again in every fusion of the backward pass. From these two
    # numbers a row, and from x, XLA makes `normal` itself again.
    mean, reciprocal = jax.lax.optimization_barrier(_moments(x, epsilon))
    normal = (x - mean) * reciprocal
    along = (normal * x_dot).mean(axis=-1, keepdims=True)
    normal_dot = reciprocal * (x_dot - x_dot.mean(axis=-1, keepdims=True) - normal * along)
    out_dot = _over_rows(normal_dot, scale, bias_dot) + normal * _row(scale_dot, x)
    return _over_rows(normal, scale, bias), out_dot


def _moments(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns the mean, and one over the deviation, each (..., 1)."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _over_rows(normal: Array, scale: Array, bias: Array) -> Array:
    return normal * _row(scale, normal) + _row(bias, normal)


def _row(parameter: Array, like: Array) -> Array:
    """Reshapes (D,) to as many axes as `like` has, because strict rank promotion needs that."""
    return parameter.reshape((1,) * (like.ndim - 1) + parameter.shape)


class LayerNorm(nnx.Module):
    """Layer that applies `layer_norm` over the last axis; `torch.nn.LayerNorm`.

    Args:
      width: D, the size of the last axis.
      epsilon: number added to the variance.
      dtype: dtype of the result; None to promote from the argument and the parameters. The computation is in at least
        float32, where no square of a float16 overflows and the mean has more than eight bits.
      param_dtype: dtype of the scale, which starts as ones, and of the bias, which starts as zeros.
    """

    def __init__(
        self, width: int, *, epsilon: float, dtype: DTypeLike | None = None, param_dtype: DTypeLike = jnp.float32
    ):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Normalises each row; (..., D) -> (..., D)."""
        x, scale, bias = promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        wide = at_least_float32(x.dtype)
        return layer_norm(x.astype(wide), scale.astype(wide), bias.astype(wide), self.epsilon).astype(x.dtype)
