"""Attention that goes backward as fused kernels do, for the reference: its rounding is what such a candidate may have.

Fused attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) keeps no probabilities. Its backward pass rounds
two values that explicit attention does not round:

- The logarithm of each row's sum of exponentials, from which it recomputes the probabilities. Half a unit of rounding
  of that logarithm is a relative error of the whole row. Explicit attention divides by the sum itself, so the errors of
  a row's scores cancel where one token has all the attention.
- The inner product of the context and its gradient, which it subtracts in place of the probabilities' inner product
  with their gradient. The two are equal, and their rounding is not.

Seen on a trained ViT-S/14 that was cut to four blocks: one head of the last block attends to one token, and the
logarithm is 186. Its half unit is 7.6e-6. The gradient of that head's value errs by up to 7.9e-6 in PyTorch, by 4.4e-7
in FlaxViT, and by as much as in PyTorch here. Random models with heads like that, whose scores reach 600, have
gradients in PyTorch that err up to 26 times as much as FlaxViT's, and at most 1.1 times as much as these.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from vit_ref.model.attention import at_least_float32


@jax.custom_vjp
def fused(query: Array, key: Array, value: Array) -> Array:
    """Softmax attention: the context (B, N, H, K) of three such arrays of one dtype."""
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = _scores(query, key)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    context = jnp.einsum("bhqm,bmhk->bqhk", probs, value)
    return context, (query, key, value, context, jax.nn.logsumexp(scores, axis=-1, keepdims=True))


def _backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
    query, key, value, context, logarithm = kept
    product = partial(jnp.einsum, preferred_element_type=logarithm.dtype)
    probs = jnp.exp(_scores(query, key) - logarithm)
    of_probs = product("bqhk,bmhk->bhqm", cotangent, value)
    # Summed in another order than the products above, as kernels do: where one token has all the attention, the two are
    # equal, and in one order they would cancel to the last bit.
    subtracted = product("bqhk,bqhk->bhq", cotangent[..., ::-1], context[..., ::-1])[..., None]
    of_scores = (probs * (of_probs - subtracted) * query.shape[-1] ** -0.5).astype(query.dtype)
    return (
        jnp.einsum("bhqm,bmhk->bqhk", of_scores, key),
        jnp.einsum("bhqm,bqhk->bmhk", of_scores, query),
        jnp.einsum("bhqm,bqhk->bmhk", probs.astype(value.dtype), cotangent),
    )


def _scores(query: Array, key: Array) -> Array:
    # In at least float32, as fused kernels hold them: a logarithm of eight bits would allow any error.
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=at_least_float32(query.dtype))
    return scores * query.shape[-1] ** -0.5


fused.defvjp(_forward, _backward)
