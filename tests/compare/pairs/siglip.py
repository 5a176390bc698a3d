"""SigLIP's vision model: tanh GELU, and attention from a learned probe in place of a cls token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from family import Family, at_any_size, draw_vision
from flax import nnx
from layers import (
    Attention,
    Block,
    Mlp,
    Tensors,
    conv_of,
    flat_patches,
    gelu,
    linear,
    linear_of,
    map_channels_last,
    norm_of,
    repeated,
    resized,
    tanh_gelu,
    tensors_of,
    without_prefix,
)

CONFIG = {
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "patch_size": 3,
    "image_size": 15,
    "num_channels": 2,
    "layer_norm_eps": 1e-6,
}


def build(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))


class Embeddings(nnx.Module):
    def __init__(self, tensors: Tensors):
        self.patch = conv_of(tensors, "patch_embedding")
        self.positions = nnx.Param(jnp.asarray(tensors["position_embedding.weight"]))

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch(images)
        positions = resized(self.positions[None], patches.shape[1:3], kept=0)
        return flat_patches(patches) + positions


class Pooling(nnx.Module):
    """One query, the probe, attends to all tokens."""

    def __init__(self, tensors: Tensors, heads: int, epsilon: float, mlp: Mlp, *, residual: bool):
        self.probe = nnx.Param(jnp.asarray(tensors["probe"]))
        weights, biases = (np.split(tensors[f"attention.in_proj_{kind}"], 3) for kind in ("weight", "bias"))
        layers = [linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self.attn = Attention(*layers, linear_of(tensors, "attention.out_proj"), heads)
        self.norm, self.mlp, self.residual = norm_of(tensors, "layernorm", epsilon), mlp, residual

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attn(repeated(self.probe, len(x)), others=x)
        value = self.mlp(self.norm(x))
        return (x + value if self.residual else value)[:, 0]


class Siglip(nnx.Module):
    """The candidate.

    Args:
      reference: whose weights it takes.
      erf: whether GELU is the exact one.
      residual: whether the pooling adds its MLP to what it attended to.
    """

    def __init__(self, reference: transformers.PreTrainedModel, *, erf: bool = False, residual: bool = True):
        config = reference.config
        heads, epsilon = config.num_attention_heads, config.layer_norm_eps
        of = without_prefix(tensors_of(reference), "vision_model.")

        def mlp(at: str) -> Mlp:
            return Mlp(linear_of(of, f"{at}.fc1"), linear_of(of, f"{at}.fc2"), gelu if erf else tanh_gelu)

        def block(at: str) -> Block:
            attention = [linear_of(of, f"{at}.self_attn.{name}_proj") for name in ("q", "k", "v", "out")]
            norm1, norm2 = (norm_of(of, f"{at}.layer_norm{n}", epsilon) for n in (1, 2))
            return Block(norm1, Attention(*attention, heads), norm2, mlp(f"{at}.mlp"))

        self.embed = Embeddings(without_prefix(of, "embeddings."))
        self.blocks = nnx.List([block(f"encoder.layers.{i}") for i in range(config.num_hidden_layers)])
        self.norm = norm_of(of, "post_layernorm", epsilon)
        self.pool = Pooling(without_prefix(of, "head."), heads, epsilon, mlp("head.mlp"), residual=residual)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.pool(self.norm(x))


def sites(config: Mapping[str, Any]) -> dict[str, Any]:
    mlp = {".mlp.fc1": ".mlp.fc1", ".mlp.fc2:input": ".mlp.activation_fn", ".mlp.fc2": ".mlp.fc2"}
    block = mlp | {
        "": "",
        ".norm1": ".layer_norm1",
        ".attn.query": ".self_attn.q_proj",
        ".attn.key": ".self_attn.k_proj",
        ".attn.value": ".self_attn.v_proj",
        ".attn": ".self_attn.out_proj",
        ".norm2": ".layer_norm2",
    }
    table = {f"blocks.{{i}}{ours}": f"encoder.layers.{{i}}{theirs}" for ours, theirs in block.items()}
    table |= {f"pool{ours}": f"head{theirs}" for ours, theirs in mlp.items()}
    table |= {
        "embed": "embeddings",
        "norm": "post_layernorm",
        "pool.attn": "head.attention",
        "pool.norm": "head.layernorm",
        "pool": "head",
    }
    return {ours: f"vision_model.{theirs}" for ours, theirs in table.items()} | {
        "embed.patch": ("vision_model.embeddings.patch_embedding", map_channels_last)
    }


def draw(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
    config, shape = draw_vision(rng)
    return config | {"intermediate_size": int(rng.choice((1, 7, 16, 31)))}, shape


FAMILY = Family(
    name="siglip",
    build=build,
    model=Siglip,
    sites=sites,
    config=CONFIG,
    shape=(12, 21),
    draw=draw,
    output=lambda returned: returned.pooler_output,
    call=at_any_size,
)
reference, candidate, wrong = FAMILY.reference(), FAMILY.candidate(), FAMILY.mutants()
