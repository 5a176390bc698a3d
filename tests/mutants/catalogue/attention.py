"""Bugs in attention: roles, heads, scale, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.mutants.injection import Inject, Pass, at, both, instead, loaded
from tests.mutants.mutant import Mutant, backward, forward
from vit_ref.model import attention, vit
from vit_ref.model.config import ViTConfig


def _probs(query: Array, key: Array, scale: float, mask: Array | None = None, axis: int = -1) -> Array:
    scores = jnp.einsum("bqhk,bmhk->bhqm", query, key) * scale
    return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf), axis=axis)


def _scaled(scale: Callable[[ViTConfig], float]) -> Inject:
    """Multiplies the scores by this factor."""
    return at(
        "block.*.attn.probs",
        lambda value, here: _probs(here["attn.query"], here["attn.key"], scale(here.model.config)),
    )


def _nearly_scaled(monkeypatch: pytest.MonkeyPatch, dose: float) -> None:
    _scaled(lambda config: dose * config.head_dim**-0.5)(monkeypatch)


def _roles(order: dict[str, str]) -> Inject:
    """Gives query, key and value each other's parameters."""
    return loaded(
        lambda parameters, config: {
            path: parameters[path.replace(f".{mine}.", f".{theirs}.")]
            for path in parameters
            for mine, theirs in order.items()
            if f".attn.{mine}." in path
        }
    )


def _head_last(value: Array, here: Pass) -> Array:
    batch, tokens, heads, width = value.shape
    return value.reshape(batch, tokens, width, heads).swapaxes(2, 3)


def _merged_in_place(value: Array, here: Pass) -> Array:
    batch, tokens, heads, width = here["attn.query"].shape
    return value.reshape(batch, tokens, heads, width).swapaxes(1, 2).reshape(value.shape)


def _heads_from_width(monkeypatch: pytest.MonkeyPatch) -> None:
    init = vit.Attention.__init__

    def wrong(self: vit.Attention, config: ViTConfig, *arguments: Any) -> None:
        init(self, config, *arguments)
        self.heads = max(1, config.hidden_size // 64)

    monkeypatch.setattr(vit.Attention, "__init__", wrong)


def _biases(parameters: dict, config: ViTConfig) -> dict:
    return {
        path: np.zeros_like(value)
        for path, value in parameters.items()
        if path.endswith(("query.bias", "key.bias", "value.bias"))
    }


def _causal(value: Array, here: Pass) -> Array:
    tokens = value.shape[-1]
    mask = jnp.broadcast_to(jnp.tri(tokens, dtype=bool), value.shape)
    return _probs(here["attn.query"], here["attn.key"], here.model.config.head_dim**-0.5, mask)


def _over_queries(value: Array, here: Pass) -> Array:
    return _probs(here["attn.query"], here["attn.key"], here.model.config.head_dim**-0.5, axis=-2)


def _one_head(monkeypatch: pytest.MonkeyPatch, dose: float) -> None:
    def last_head(value: Array, here: Pass) -> Array:
        return value.at[:, :, -1].multiply(1 + dose)

    at("block.1.attn.value", last_head)(monkeypatch)


def _unshifted(scores: Array, axis: int) -> Array:
    exponentials = jnp.exp(scores)
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def _untapped(factor: Callable[[Array], float]) -> Inject:
    """Multiplies the scores by this factor, too, if the probabilities are not observed."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        right = vit.attend
        monkeypatch.setattr(vit, "attend", lambda query, key, value: right(query * factor(query), key, value))

    return inject


MUTANTS = (
    Mutant(
        number=7,
        name="query-and-key-swapped",
        story="query and key are exchanged in the weight map",
        source="two tensors of one shape; with one token the output is right",
        inject=_roles({"query": "key", "key": "query"}),
        first_site="block.0.attn.query",
        cause="parameters of block.0.attn.key",
    ),
    Mutant(
        number=8,
        name="heads-merged-without-moving-the-axis",
        story="(B, H, N, K) is reshaped to (B, N, D) as it lies in memory; training still converges",
        source="transformer-from-scratch #6",
        inject=at("block.*.attn.context", _merged_in_place),
        first_site="block.0.attn.context",
        cause="heads merged without moving the axis",
    ),
    Mutant(
        number=9,
        name="heads-split-in-the-wrong-order",
        story="(B, N, D) is split as (K, H), not as (H, K)",
        source="FuxiCTR #30",
        inject=both(*(at(f"block.*.attn.{role}", _head_last) for role in ("query", "key", "value"))),
        first_site="block.0.attn.query",
        cause="heads split in the wrong order",
    ),
    Mutant(
        number=10,
        name="fused-qkv-in-another-order",
        story="a fused kernel is cut into key, query, value",
        source="vLLM #13686",
        inject=_roles({"query": "key", "key": "value", "value": "query"}),
        first_site="block.0.attn.query",
        cause="parameters of block.0.attn.key",
    ),
    Mutant(
        number=12,
        name="attention-scale-omitted",
        story="scores are not divided by sqrt(head_dim)",
        source="mlc-llm #3426",
        inject=_scaled(lambda config: 1.0),
        first_site="block.0.attn.probs",
        cause="attention scale left out",
    ),
    Mutant(
        number=13,
        name="attention-scale-twice",
        story="both the query and the scores are scaled",
        source="HF #39043; jax.nn.dot_product_attention scales by itself",
        inject=_scaled(lambda config: 1 / config.head_dim),
        first_site="block.0.attn.probs",
        cause="attention scale applied twice",
    ),
    Mutant(
        name="attention-scale-inverted",
        story="scores are multiplied by sqrt(head_dim)",
        source="HF #39043 has both",
        inject=_scaled(lambda config: config.head_dim**0.5),
        first_site="block.0.attn.probs",
        cause="attention scale inverted",
    ),
    Mutant(
        number=14,
        name="attention-scale-by-heads",
        story="1/sqrt(heads); the most probable class often stays the same",
        source="tt-metal #56789",
        inject=_scaled(lambda config: config.num_attention_heads**-0.5),
        first_site="block.0.attn.probs",
        cause="attention scale 1/sqrt(heads)",
    ),
    Mutant(
        number=15,
        name="attention-scale-by-hidden-size",
        story="1/sqrt(hidden_size)",
        source="ViT-CIFAR #12",
        inject=_scaled(lambda config: config.hidden_size**-0.5),
        first_site="block.0.attn.probs",
        cause="attention scale 1/sqrt(hidden_size)",
    ),
    Mutant(
        name="attention-scale-nearly-right",
        story="the scale is rounded, to two digits or in half precision",
        source="scales stored in configs and in quantised kernels",
        inject=_nearly_scaled,
        doses=(1 + 1e-2, 1 + 1e-4, 1 + 1e-10),
        first_site="block.0.attn.probs",
        cause=tuple(f"attention scale {times} x the right one" for times in ("1.01", "1.0001", "1.0000000001")),
    ),
    Mutant(
        number=16,
        name="qkv-bias-dropped",
        story="query, key and value are loaded without their biases",
        source="x-transformers #37",
        inject=loaded(_biases),
        first_site="block.0.attn.query",
        cause="bias left out",
    ),
    Mutant(
        number=45,
        name="head-dim-64-hard-coded",
        story="the number of heads is hidden_size // 64",
        source="jimm",
        inject=_heads_from_width,
        # The error of values with a wrong shape is infinite.
        first_site="block.0.attn.query",
    ),
    Mutant(
        number=47,
        name="qkv-bias-false-ignored",
        story="the model has random biases that the checkpoint lacks",
        source="a default of use_bias=True that the config does not reach",
        inject=at("block.*.attn.query", lambda value, here: value + 0.02 * jnp.cos(jnp.arange(value.shape[-1]))),
        tests=forward("no-qkv-bias"),
        first_site="block.0.attn.query",
    ),
    Mutant(
        name="causal-mask",
        story="a token attends only to itself and earlier tokens",
        source="a block reused from a language model",
        inject=at("block.*.attn.probs", _causal),
        first_site="block.0.attn.probs",
        cause="causal mask",
    ),
    Mutant(
        name="softmax-over-the-queries",
        story="the columns of the probabilities sum to one, not the rows",
        source="softmax(dim=-2), or exchanged letters in einsum",
        inject=at("block.*.attn.probs", _over_queries),
        first_site="block.0.attn.probs",
        cause="softmax over the queries",
    ),
    Mutant(
        name="softmax-without-the-maximum",
        story="exponentials of the scores without subtracting their maximum",
        source="the textbook's formula; it overflows at scores of 89",
        inject=lambda monkeypatch: instead(monkeypatch, attention, "jax.nn.softmax", _unshifted),
        killed_by="consistency",
        # It is the same function within range: only extreme scores show it, by a NaN, which names no site.
        tests=("tests/consistency/test_extremes.py", "-k", "all-scores-1e4-float32"),
    ),
    Mutant(
        name="one-head-off",
        story="the last head of one block is scaled by another factor",
        source="pruning and quantisation work head by head",
        inject=_one_head,
        doses=(1e-2, 1e-9),
        tests=forward("rectangular"),
        first_site="block.1.attn.value",
        cause=("1.01 x the reference", None),
    ),
    Mutant(
        name="no-gradient-through-the-probabilities",
        story="attention weights are detached, as for visualisation",
        source="code for drawing maps is left in the training code",
        inject=at("block.*.attn.probs", lambda value, here: jax.lax.stop_gradient(value)),
        tests=backward("rectangular"),
        # The gradient at the probabilities themselves is right; queries and keys get none.
        first_site="block.1.attn.key",
        cause="all zero",
    ),
    Mutant(
        name="untapped-attention-off-in-half-precision",
        story="only the path without a tap has a scale larger by a sixteenth, only in half precision",
        source="fused kernels have a path of their own for each dtype",
        inject=_untapped(lambda query: 1 if query.dtype == jnp.float32 else 1 + 2**-4),
        killed_by="model",
        # It has no site, because the bug is in a path without a tap.
        tests=("tests/model/test_model.py", "-k", "two_paths_agree"),
    ),
    Mutant(
        name="untapped-attention-scaled-otherwise",
        story="only the path without a tap, which users run and nobody observes, has another scale",
        source="two paths for one formula, one of them tested",
        inject=_untapped(lambda query: 0.25 * query.shape[-1] ** 0.5),
        killed_by="model",
        # It has no site, because the bug is in a path without a tap.
        tests=("tests/model/test_model.py", "-k", "plain and rectangular and not patch"),
    ),
)
