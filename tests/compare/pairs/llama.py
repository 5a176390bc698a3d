"""A small Llama: no images, fewer K/V heads than queries, RoPE, RMSNorm and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from family import Family, token_ids
from flax import nnx
from layers import Attention, Block, GatedMlp, linear_of, rms_norm_of, rotated, spread, tensors_of, without_prefix

CONFIG = {
    "vocab_size": 31,
    "hidden_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 37,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def build(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, use_cache=False))


class Rope(nnx.Module):
    """Cosine and sine of the angles that a token's place stands for."""

    def __init__(self, frequencies: np.ndarray, *, interleaved: bool):
        self.frequencies, self.interleaved = nnx.Variable(jnp.asarray(frequencies)), interleaved

    def __call__(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        frequencies = self.frequencies[...]
        places = jnp.arange(tokens).astype(frequencies.dtype)
        return spread(places[:, None] * frequencies[None], interleaved=self.interleaved)


class Llama(nnx.Module):
    """The candidate.

    Args:
      reference: whose weights it takes.
      interleaved: whether RoPE turns neighbours instead of halves.
      epsilon: of RMSNorm; None: the reference's.
      tiled: whether query head n takes K/V head n modulo their number.
      scaled_by_width: whether the scores are divided by the root of the whole width.
    """

    def __init__(
        self,
        reference: transformers.PreTrainedModel,
        *,
        interleaved: bool = False,
        epsilon: float | None = None,
        tiled: bool = False,
        scaled_by_width: bool = False,
    ):
        config, tensors = reference.config, tensors_of(reference)
        heads, epsilon = config.num_attention_heads, config.rms_norm_eps if epsilon is None else epsilon
        of = without_prefix(tensors, "model.")

        def block(at: str) -> Block:
            attention = [linear_of(of, f"{at}.self_attn.{name}_proj") for name in "qkvo"]
            mlp = [linear_of(of, f"{at}.mlp.{name}_proj") for name in ("gate", "up", "down")]
            norm1, norm2 = (rms_norm_of(of, f"{at}.{name}_layernorm", epsilon) for name in ("input", "post_attention"))
            attn = Attention(*attention, heads, causal=True, tiled=tiled, scaled_by_width=scaled_by_width)
            return Block(norm1, attn, norm2, GatedMlp(*mlp, nnx.silu))

        self.embedding = nnx.Param(jnp.asarray(of["embed_tokens.weight"]))
        self.rope = Rope(of["rotary_emb.inv_freq"], interleaved=interleaved)
        self.blocks = nnx.List([block(f"layers.{i}") for i in range(config.num_hidden_layers)])
        self.norm = rms_norm_of(of, "norm", epsilon)
        self.head = linear_of(tensors, "lm_head")

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedding[ids]
        cos, sin = self.rope(ids.shape[1])
        for block in self.blocks:
            x = block(x, rotate=partial(rotated, cos=cos, sin=sin, interleaved=self.rope.interleaved))
        return self.head(self.norm(x))


def sites(config: Mapping[str, Any]) -> dict[str, Any]:
    block = {
        "": "",
        ".norm1": ".input_layernorm",
        ".attn.query": ".self_attn.q_proj",
        ".attn.key": ".self_attn.k_proj",
        ".attn.value": ".self_attn.v_proj",
        ".attn": ".self_attn.o_proj",
        ".norm2": ".post_attention_layernorm",
        ".mlp.gate": ".mlp.gate_proj",
        ".mlp.up": ".mlp.up_proj",
        ".mlp": ".mlp.down_proj",
    }
    return {f"blocks.{{i}}{ours}": f"model.layers.{{i}}{theirs}" for ours, theirs in block.items()} | {
        "blocks.0.norm1:input": "model.embed_tokens",
        "rope[0]": "model.rotary_emb",
        "rope[1]": "model.rotary_emb:1",
        "norm": "model.norm",
        "head": "lm_head",
    }


def draw(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
    groups, heads = (int(rng.choice((1, 2, 3))) for _ in range(2))
    config = {
        "vocab_size": int(rng.integers(2, 40)),
        "hidden_size": int(rng.choice((5, 11, 16, 23))),
        "num_hidden_layers": int(rng.integers(1, 3)),
        "num_attention_heads": groups * heads,
        "num_key_value_heads": heads,
        "head_dim": int(rng.choice((2, 4, 6, 10))),
        "intermediate_size": int(rng.choice((1, 7, 16, 31))),
        "rms_norm_eps": float(rng.choice((1e-6, 1e-5, 1e-3))),
        "rope_theta": float(rng.choice((100, 10000, 500000))),
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        # The defaults are out of a small vocabulary.
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return config, (int(rng.integers(1, 14)),)


FAMILY = Family(
    name="llama",
    build=build,
    model=Llama,
    sites=sites,
    config=CONFIG,
    shape=(13,),
    draw=draw,
    output=lambda returned: returned.logits,
    inputs=token_ids,
    adapt=None,
)
reference, candidate, wrong = FAMILY.reference(), FAMILY.candidate(), FAMILY.mutants()
