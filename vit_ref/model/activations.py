"""The activations that a checkpoint's config can name, each as its reference computes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from vit_ref.model.attention import at_least_float32


def gelu(x: Array) -> Array:
    """The erf form of GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415); `torch.nn.GELU()`.

    In float32 and float64 through erfc, as jax does it, whose relative accuracy far below zero is that of its argument.
    Half the sum of one and erf cancels there: a layer whose units are all at -5 then errs by 2e-11 in float64, and by
    6 % in float32.

    In half precision in float32, so that a unit errs by one rounding, and through that sum, for speed: what it loses is
    1e-7, all there is below -5.4, where a rounding of x to bfloat16 already changes the result by some per cent. On an
    H200 a train step of ViT-B/16 took 0.94 times as long as with erfc in bfloat16.
    """
    if x.dtype == at_least_float32(x.dtype):
        return jax.nn.gelu(x, approximate=False)
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


# jax.nn.gelu's own default is the tanh form; "gelu" in a checkpoint's config is the erf form.
#
# Those that would keep more than their argument or result for the way back are computed again there. With GELU a train
# step of B/16 takes 4 % less time on a CPU, is compiled in 10 % less and, on 32 images, needs 20 % less memory; on an
# H100 2 % more time and a quarter less memory.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.checkpoint(gelu),
    "gelu_new": jax.checkpoint(partial(jax.nn.gelu, approximate=True)),
    "gelu_python": jax.checkpoint(gelu),
    "gelu_pytorch_tanh": jax.checkpoint(partial(jax.nn.gelu, approximate=True)),
    "quick_gelu": jax.checkpoint(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "silu": jax.checkpoint(jax.nn.silu),
    "swish": jax.checkpoint(jax.nn.silu),
    "tanh": jnp.tanh,
}
