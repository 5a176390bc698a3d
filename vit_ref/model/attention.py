"""What a query finds: softmax attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) in several ways.

`weigh` lets its probabilities be seen and changed. The others are for where nobody asks for them: `attend`, which
models take, and `cudnn`, which they can be given.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from vit_ref.errors import InputError

# (query, key, value) -> context, each (B, N, H, K), of one dtype.
Attend = Callable[[Array, Array, Array], Array]


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """float64 for float64, and float32 for everything else."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def weigh(query: Array, key: Array, value: Array, seen: Callable[[Array], Array] = lambda probs: probs) -> Array:
    """The values, weighted by a softmax in at least float32: (B, N, H, K) of three such arrays.

    Args:
      query: (B, N, H, K).
      key: likewise.
      value: likewise.
      seen: given the probabilities (B, H, N, N), in the query's dtype; what it returns takes their place.
    """
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=at_least_float32(query.dtype))
    probs = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqm,bmhk->bqhk", seen(probs), value)


def attend(query: Array, key: Array, value: Array) -> Array:
    """The same, (B, N, H, K) of three such arrays, where nobody asks for the probabilities.

    In float32 and float64 the exponentials are divided by their sum after they have weighted the values: K quotients a
    query and not N, and one array of (B, H, N, N) less to keep for the way back. Beside
    `jax.nn.dot_product_attention`, which is XLA's softmax wherever cuDNN is not asked for, a train step of ViT-S/16 on
    CPU takes 8 % less time, of B/16 4 %.

    In half precision the cotangents of the exponentials would be rounded, and those of their sum not, from which they
    are subtracted: where attention is sharp, queries' gradients erred three times as much. There it is `weigh`.
    """
    if query.dtype != at_least_float32(query.dtype):
        return weigh(query, key, value)
    # Products of matrices that lie in one piece: 3 % of those 8.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhqk,bhmk->bhqm", query, key)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp((scores - largest) * query.shape[-1] ** -0.5)
    context = jnp.einsum("bhqm,bhmk->bhqk", weights, value) / weights.sum(axis=-1, keepdims=True)
    return context.swapaxes(1, 2)


def cudnn(query: Array, key: Array, value: Array, *, tokens: int | None = None) -> Array:
    """cuDNN's fused attention, for half precision on NVIDIA's GPUs; `VisionTransformer(attention=cudnn)`.

    The probabilities are never in memory: benchmarks/RESULTS.md has what that saves. It can be differentiated backwards
    and once, not forwards, and `jax.export` refuses it. Its gradients are the same to the last bit each time only under
    `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.

    Args:
      query: (B, N, H, K), bfloat16 or float16, K as `require_heads` has it.
      key: likewise.
      value: likewise.
      tokens: how many of the N are tokens, one at least; the rest is padding, of finite values, which no token sees,
        and whose context and gradients are zero. None for all. Where N is no multiple that cuDNN takes, see `padding`,
        it is padded here.

    Raises:
      InputError: they are of another dtype, or see `require_cudnn` and `require_heads`.
      NotImplementedError: jax's, where cuDNN cannot do this.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(f"cuDNN's attention is for half precision, and not {query.dtype}: give dtype=jnp.bfloat16")
    require_cudnn()
    require_heads(query.shape[-1])
    rows = query.shape[1]
    tokens = rows if tokens is None else tokens
    # Of the query though it is the same for each image: jax's batching rule wants lengths that have the batch, too.
    lengths = jnp.where(jnp.isnan(query[:, 0, 0, 0]), tokens, tokens).astype(jnp.int32)
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding(rows)), (0, 0), (0, 0))) for x in (query, key, value))
    context = jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return context[:, :rows]


def padding(rows: int) -> int:
    """How many rows to add for `cudnn`, which else adds them itself: in every block, and out again.

    jax asks for an even number where it differentiates, and a ViT's is odd; and a row of scores takes whole 16 bytes.
    """
    return -rows % 8


def require_cudnn() -> None:
    """Raises `InputError` where jax's own device is none of NVIDIA's that `cudnn` runs on."""
    if _capability() < 8:
        raise InputError(
            "cuDNN's attention needs one of NVIDIA's GPUs, Ampere or later, and jax's device is"
            f" {jax.devices()[0].device_kind}: leave it out"
        )


def require_heads(head_dim: int) -> None:
    """Raises `InputError` where `cudnn` does not take heads of this width, on a device that it runs on."""
    # What jax itself checks, in words that no user of this package wrote.
    widest = 256 if _capability() >= 9 else 128
    if head_dim % 8 or head_dim > widest:
        raise InputError(
            f"cuDNN's attention takes heads a multiple of 8 and here at most {widest} wide, and not {head_dim}:"
            " leave it out"
        )


def _capability() -> float:
    """The compute capability of jax's own device, 0 where it is none of NVIDIA's."""
    device = jax.devices()[0]
    return float(device.compute_capability) if "cuda" in device.client.platform_version else 0.0
