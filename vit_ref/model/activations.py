"""The activations that a checkpoint's config can name. Each computes what the reference computes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from vit_ref.model.attention import at_least_float32


def gelu(x: Array) -> Array:
    """Returns the erf form of GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415); `torch.nn.GELU()`.

    In float32 and float64 it uses erfc, as jax does. 1 + erf would cancel for values far below zero.

    In half precision it computes 1 + erf in float32, which is faster, and rounds once. The cancellation is an error of
    3e-7 at most, below -3. In float32 it would be percents of the result at -5, and all of it at -8.

    Args:
      x: an array of any shape and floating dtype.

    Returns:
      An array with the shape and dtype of x.
    """
    if x.dtype == at_least_float32(x.dtype):
        return jax.nn.gelu(x, approximate=False)
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def tanh_gelu(x: Array) -> Array:
    """Returns the tanh form of GELU; `torch.nn.GELU(approximate="tanh")`.

    In half precision it computes in float32 and rounds once. `jax.nn.gelu` computes each step in x's dtype, and in
    bfloat16 its 1 + tanh errs by 61 % of the result at -3.

    Args:
      x: an array of any shape and floating dtype.

    Returns:
      An array with the shape and dtype of x.
    """
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=True).astype(x.dtype)


# "gelu" in a checkpoint's config is the erf form, and not the tanh form that jax.nn.gelu has by default.
#
# The backward pass recomputes an activation that would otherwise store more than its argument or result. This saves
# memory, and on CPUs time too.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.checkpoint(gelu),
    "gelu_new": jax.checkpoint(tanh_gelu),
    "gelu_python": jax.checkpoint(gelu),
    "gelu_pytorch_tanh": jax.checkpoint(tanh_gelu),
    "quick_gelu": jax.checkpoint(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "silu": jax.checkpoint(jax.nn.silu),
    "swish": jax.checkpoint(jax.nn.silu),
    "tanh": jnp.tanh,
}
