"""CLIP's vision model with its projection: quick GELU, and a norm before the blocks."""

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
    linear_of,
    map_channels_last,
    norm_of,
    quick_gelu,
    resized,
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
    "projection_dim": 11,
    "layer_norm_eps": 1e-5,
}


def build(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))


class Embeddings(nnx.Module):
    def __init__(self, tensors: Tensors):
        self.patch = conv_of(tensors, "patch_embedding")
        self.cls = nnx.Param(jnp.asarray(tensors["class_embedding"]))
        self.positions = nnx.Param(jnp.asarray(tensors["position_embedding.weight"]))

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch(images)
        positions = resized(self.positions[None], patches.shape[1:3], kept=1)
        cls = jnp.broadcast_to(self.cls[None, None], (len(images), 1, patches.shape[-1]))
        return jnp.concatenate([cls, flat_patches(patches)], axis=1) + positions


class Clip(nnx.Module):
    """The candidate.

    Args:
      reference: whose weights it takes.
      exact: whether GELU stands for quick GELU.
      pre_norm: whether there is a norm before the blocks.
    """

    def __init__(self, reference: transformers.PreTrainedModel, *, exact: bool = False, pre_norm: bool = True):
        config, tensors = reference.config, tensors_of(reference)
        epsilon, activation = config.layer_norm_eps, gelu if exact else quick_gelu
        of = without_prefix(tensors, "vision_model.")

        def block(at: str) -> Block:
            attention = [linear_of(of, f"{at}.self_attn.{name}_proj") for name in ("q", "k", "v", "out")]
            norm1, norm2 = (norm_of(of, f"{at}.layer_norm{n}", epsilon) for n in (1, 2))
            mlp = Mlp(linear_of(of, f"{at}.mlp.fc1"), linear_of(of, f"{at}.mlp.fc2"), activation)
            return Block(norm1, Attention(*attention, config.num_attention_heads), norm2, mlp)

        self.embed = Embeddings(without_prefix(of, "embeddings."))
        self.pre_norm = norm_of(of, "pre_layrnorm", epsilon) if pre_norm else None
        self.blocks = nnx.List([block(f"encoder.layers.{i}") for i in range(config.num_hidden_layers)])
        self.norm = norm_of(of, "post_layernorm", epsilon)
        self.head = linear_of(tensors, "visual_projection")

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def sites(config: Mapping[str, Any]) -> dict[str, Any]:
    block = {
        "": "",
        ".norm1": ".layer_norm1",
        ".attn.query": ".self_attn.q_proj",
        ".attn.key": ".self_attn.k_proj",
        ".attn.value": ".self_attn.v_proj",
        ".attn": ".self_attn.out_proj",
        ".norm2": ".layer_norm2",
        ".mlp.fc1": ".mlp.fc1",
        ".mlp.fc2:input": ".mlp.activation_fn",
        ".mlp.fc2": ".mlp.fc2",
    }
    table = {f"blocks.{{i}}{ours}": f"encoder.layers.{{i}}{theirs}" for ours, theirs in block.items()}
    table |= {"embed": "embeddings", "pre_norm": "pre_layrnorm", "norm": "post_layernorm"}
    return {ours: f"vision_model.{theirs}" for ours, theirs in table.items()} | {
        "embed.patch": ("vision_model.embeddings.patch_embedding", map_channels_last),
        "head": "visual_projection",
    }


def draw(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
    config, shape = draw_vision(rng)
    sizes = {"intermediate_size": int(rng.choice((1, 7, 16, 31))), "projection_dim": int(rng.integers(1, 12))}
    return config | sizes, shape


FAMILY = Family(
    name="clip",
    build=build,
    model=Clip,
    sites=sites,
    config=CONFIG,
    shape=(12, 21),
    draw=draw,
    output=lambda returned: returned.image_embeds,
    call=at_any_size,
)
reference, candidate, wrong = FAMILY.reference(), FAMILY.candidate(), FAMILY.mutants()
