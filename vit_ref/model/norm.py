"""LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450), with its derivative written out."""

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
    """Each row with its mean taken away and divided by its deviation, then scaled and shifted; `torch.nn.LayerNorm`.

    The variance is that of the centred row: E[x^2] - E[x]^2, flax's default, loses mean^2 / variance units of rounding
    and can go negative.

    Args:
      x: (..., D).
      scale: (D,), of x's dtype.
      bias: likewise.
      epsilon: added to the variance.

    Returns:
      Like x, computed in its dtype.
    """
    mean, reciprocal = _moments(x, epsilon)
    return _over_rows((x - mean) * reciprocal, scale, bias)


@layer_norm.defjvp
def _layer_norm_jvp(
    epsilon: float, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # What differentiation makes of the formula is longer, and XLA compiles it into more passes over memory: a train
    # step of ViT-B/16 then took 1.10 times as long on an H200, and on a CPU, on 32 images, 7 % more memory.
    x, scale, bias = primals
    x_dot, scale_dot, bias_dot = tangents
    # Behind a barrier, else every fusion on the way back computes them again; from them, two numbers a row, and x it
    # makes `normal` itself.
    mean, reciprocal = jax.lax.optimization_barrier(_moments(x, epsilon))
    normal = (x - mean) * reciprocal
    along = (normal * x_dot).mean(axis=-1, keepdims=True)
    normal_dot = reciprocal * (x_dot - x_dot.mean(axis=-1, keepdims=True) - normal * along)
    out_dot = _over_rows(normal_dot, scale, bias_dot) + normal * _row(scale_dot, x)
    return _over_rows(normal, scale, bias), out_dot


def _moments(x: Array, epsilon: float) -> tuple[Array, Array]:
    """The mean, and one over the deviation, (..., 1) each."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _over_rows(normal: Array, scale: Array, bias: Array) -> Array:
    return normal * _row(scale, normal) + _row(bias, normal)


def _row(parameter: Array, like: Array) -> Array:
    """(D,) with as many axes as `like`, which strict promotion of ranks asks for."""
    return parameter.reshape((1,) * (like.ndim - 1) + parameter.shape)


class LayerNorm(nnx.Module):
    """A layer of `layer_norm` over the last axis; `torch.nn.LayerNorm`.

    Args:
      width: D, of that axis.
      epsilon: added to the variance.
      dtype: dtype of the result, None to promote from its argument and parameters. The computation is in at least
        float32, in which no square of a float16 overflows and no mean is rounded to eight bits.
      param_dtype: dtype of the scale, which begins as ones, and of the bias, zeros.
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
