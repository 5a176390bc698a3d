"""Attention with the backward pass of fused kernels, for the reference: it shows how such a candidate may round.

Fused attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) keeps no probabilities. Three values of its backward
pass round as no value of explicit attention does:

- The logarithm of each row's sum of exponentials, from which it recomputes the probabilities. Half a unit of rounding
  of that logarithm is a relative error of the whole row. Explicit attention divides by the sum itself, so the errors of
  a row's scores cancel where one token has all the attention.
- The scores, which it computes again. If they are summed in another order, they are not those in the logarithm.
- The inner product of the context and its gradient. It subtracts this instead of the probabilities' inner product
  with their gradient. The two are equal, but they round differently.

The first two errors grow with the scores. A head that attends to one token with a score of some hundreds may err twenty
times as much as explicit attention.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from vit_ref.model.attention import at_least_float32


@jax.custom_vjp
def fused(query: Array, key: Array, value: Array) -> Array:
    """Returns softmax attention with the backward pass of a fused kernel.

    Args:
      query: (B, N, H, K).
      key: (B, N, H, K), of the same dtype.
      value: (B, N, H, K), of the same dtype.

    Returns:
      The context (B, N, H, K).
    """
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = _scores(query, key)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    context = jnp.einsum("bhqm,bmhk->bqhk", probs, value)
    return context, (query, key, value, context, jax.nn.logsumexp(scores, axis=-1, keepdims=True))


def _backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
    query, key, value, context, logarithm = kept
    product = partial(jnp.einsum, preferred_element_type=logarithm.dtype)
    # In another order than forward, as a kernel may sum them. In one order their rounding would cancel.
    probs = jnp.exp(_scores(query[..., ::-1], key[..., ::-1]) - logarithm)
    of_probs = product("bqhk,bmhk->bhqm", cotangent, value)
    # Summed in another order than the products above, as kernels do. If one token has all the attention, the two are
    # equal, and in one order they would cancel to the last bit.
    subtracted = product("bqhk,bqhk->bhq", cotangent[..., ::-1], context[..., ::-1])[..., None]
    of_scores = (probs * (of_probs - subtracted) * query.shape[-1] ** -0.5).astype(query.dtype)
    return (
        jnp.einsum("bhqm,bmhk->bqhk", of_scores, key),
        jnp.einsum("bhqm,bqhk->bmhk", of_scores, query),
        jnp.einsum("bhqm,bqhk->bmhk", probs.astype(value.dtype), cotangent),
    )


def _scores(query: Array, key: Array) -> Array:
    # At least float32, as in fused kernels: a logarithm of eight bits would allow any error.
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=at_least_float32(query.dtype))
    return scores * query.shape[-1] ** -0.5


fused.defvjp(_forward, _backward)
