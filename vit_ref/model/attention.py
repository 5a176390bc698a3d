"""Softmax attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) in several forms.

`weigh` lets a caller see and change its probabilities. The others never expose them: `attend`, the default of models,
and `cudnn`, which a caller can give to a model.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from vit_ref.errors import InputError

# (query, key, value) -> context, each (B, N, H, K) and of one dtype.
Attend = Callable[[Array, Array, Array], Array]


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """Returns float64 for float64, and float32 for every other dtype."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def weigh(query: Array, key: Array, value: Array, seen: Callable[[Array], Array] = lambda probs: probs) -> Array:
    """Returns the values weighted by a softmax, which it computes in at least float32.

    Args:
      query: (B, N, H, K).
      key: (B, N, H, K), of the same dtype.
      value: (B, N, H, K), of the same dtype.
      seen: function of the probabilities (B, H, N, N), in the query's dtype. Its result takes their place.

    Returns:
      The context (B, N, H, K), of the same dtype.
    """
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=at_least_float32(query.dtype))
    probs = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqm,bmhk->bqhk", seen(probs), value)


def attend(query: Array, key: Array, value: Array) -> Array:
    """Returns the same as `weigh`, for callers that do not need the probabilities.

    In float32 and float64 it divides by the sum of the exponentials after they weighted the values. This takes K
    divisions a query and not N. And the backward pass keeps one array (B, H, N, N) less.

    In half precision it calls `weigh`. The other form would round the cotangents of the exponentials, but not those of
    their sum, from which they are subtracted. If attention is sharp, that makes the queries' gradients less exact.

    Args:
      query: (B, N, H, K).
      key: (B, N, H, K), of the same dtype.
      value: (B, N, H, K), of the same dtype.

    Returns:
      The context (B, N, H, K), of the same dtype.
    """
    if query.dtype != at_least_float32(query.dtype):
        return weigh(query, key, value)
    # Products of matrices that are contiguous in memory are faster.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhqk,bhmk->bhqm", query, key)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp((scores - largest) * query.shape[-1] ** -0.5)
    context = jnp.einsum("bhqm,bhmk->bhqk", weights, value) / weights.sum(axis=-1, keepdims=True)
    return context.swapaxes(1, 2)


def cudnn(query: Array, key: Array, value: Array, *, tokens: int | None = None) -> Array:
    """Returns attention by cuDNN's fused kernel, for half precision on NVIDIA GPUs.

    Give it to a model with `VisionTransformer(attention=cudnn)`. The probabilities are never in memory;
    benchmarks/RESULTS.md shows what that saves. The limits are:

    - It has a backward pass, and neither forward-mode nor second derivatives. `jax.export` refuses it.
    - Its gradients are reproducible to the last bit only under `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.

    Args:
      query: (B, N, H, K), bfloat16 or float16. `require_heads` checks K.
      key: (B, N, H, K), of the same dtype.
      value: (B, N, H, K), of the same dtype.
      tokens: number of the N rows that are tokens, at least one; None for all. The others are padding with finite
        values: no token attends to them, and their context and gradients are zero. If cuDNN does not take N rows, this
        function pads them, see `padding`.

    Returns:
      The context (B, N, H, K), of the same dtype.

    Raises:
      InputError: the dtype is another one, or the device or the heads do not fit, see `require_cudnn` and
        `require_heads`.
      NotImplementedError: from jax, if cuDNN cannot do this.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(f"cuDNN's attention takes half precision, and this is {query.dtype}: give dtype=jnp.bfloat16")
    require_cudnn()
    require_heads(query.shape[-1])
    rows = query.shape[1]
    tokens = rows if tokens is None else tokens
    # The lengths are the same for every image. They depend on the query because jax's batching rule needs their batch.
    lengths = jnp.where(jnp.isnan(query[:, 0, 0, 0]), tokens, tokens).astype(jnp.int32)
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding(rows)), (0, 0), (0, 0))) for x in (query, key, value))
    context = jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return context[:, :rows]


def padding(rows: int) -> int:
    """Counts the rows to add for `cudnn`. A model that adds them once saves `cudnn` from doing so in every block.

    jax needs an even number for the backward pass, and a ViT's is odd. A row of scores has to fill whole 16 bytes.
    """
    return -rows % 8


def require_cudnn() -> None:
    """Checks that jax's device can run `cudnn`.

    Raises:
      InputError: jax's device is not an NVIDIA GPU that `cudnn` runs on.
    """
    if _capability() < 8:
        raise InputError(
            f"jax's device is {jax.devices()[0].device_kind}, and cuDNN's attention needs an NVIDIA GPU, Ampere or"
            " later: leave it out"
        )


def require_heads(head_dim: int) -> None:
    """Checks that `cudnn` takes heads of this width on jax's device.

    Args:
      head_dim: width of a head.

    Raises:
      InputError: it does not.
    """
    # jax itself checks this, with a message that does not fit a user of this package.
    widest = 256 if _capability() >= 9 else 128
    if head_dim % 8 or head_dim > widest:
        raise InputError(
            f"the model's heads are {head_dim} wide, and cuDNN's attention takes a multiple of 8, here at most"
            f" {widest}: leave it out"
        )


def _capability() -> float:
    """Returns the compute capability of jax's device, or 0 if that is not an NVIDIA GPU."""
    device = jax.devices()[0]
    return float(device.compute_capability) if "cuda" in device.client.platform_version else 0.0
