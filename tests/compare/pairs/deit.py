"""DeiT with distillation: two tokens before the patches, and the mean of two heads."""

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
    kernel_channels_first,
    linear_of,
    norm_of,
    repeated,
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
    "num_labels": 11,
    "layer_norm_eps": 1e-12,
}


def build(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**config))


class Embeddings(nnx.Module):
    def __init__(self, tensors: Tensors):
        self.patch = conv_of(tensors, "patch_embeddings.projection")
        self.cls, self.distillation, self.positions = (
            nnx.Param(jnp.asarray(tensors[name])) for name in ("cls_token", "distillation_token", "position_embeddings")
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch(images)
        start = (repeated(token, len(images)) for token in (self.cls, self.distillation))
        tokens = jnp.concatenate([*start, flat_patches(patches)], axis=1)
        return tokens + resized(self.positions[...], patches.shape[1:3], kept=2)


class Deit(nnx.Module):
    """The candidate.

    Args:
      reference: whose weights it takes.
      one_head: whether the cls token's head alone decides.
    """

    def __init__(self, reference: transformers.PreTrainedModel, *, one_head: bool = False):
        config, tensors = reference.config, tensors_of(reference)
        of = without_prefix(tensors, "deit.")

        def block(at: str) -> Block:
            attention = (f"attention.attention.{name}" for name in ("query", "key", "value"))
            layers = [linear_of(of, f"{at}.{name}") for name in (*attention, "attention.output.dense")]
            return Block(
                norm_of(of, f"{at}.layernorm_before", config.layer_norm_eps),
                Attention(*layers, config.num_attention_heads),
                norm_of(of, f"{at}.layernorm_after", config.layer_norm_eps),
                Mlp(linear_of(of, f"{at}.intermediate.dense"), linear_of(of, f"{at}.output.dense"), gelu),
            )

        self.embed = Embeddings(without_prefix(of, "embeddings."))
        self.blocks = nnx.List([block(f"encoder.layer.{i}") for i in range(config.num_hidden_layers)])
        self.norm = norm_of(of, "layernorm", config.layer_norm_eps)
        self.head, self.distilled = (linear_of(tensors, f"{name}_classifier") for name in ("cls", "distillation"))
        self.one_head = one_head

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        first, second = self.head(x[:, 0]), self.distilled(x[:, 1])
        return first if self.one_head else (first + second) / 2


def sites(config: Mapping[str, Any]) -> dict[str, Any]:
    block = {
        "": "",
        ".norm1": ".layernorm_before",
        ".attn.query": ".attention.attention.query",
        ".attn.key": ".attention.attention.key",
        ".attn.value": ".attention.attention.value",
        ".attn.out:input": ".attention.attention",
        ".attn": ".attention.output.dense",
        ".norm2": ".layernorm_after",
        ".mlp.fc1": ".intermediate.dense",
        ".mlp.fc2:input": ".intermediate",
        ".mlp": ".output.dense",
    }
    table = {f"blocks.{{i}}{ours}": f"encoder.layer.{{i}}{theirs}" for ours, theirs in block.items()}
    table |= {"embed.patch": "embeddings.patch_embeddings", "embed": "embeddings", "norm": "layernorm"}
    return {ours: f"deit.{theirs}" for ours, theirs in table.items()} | {
        "head": "cls_classifier",
        "distilled": "distillation_classifier",
    }


def transposed(kernel: np.ndarray) -> np.ndarray:
    return kernel.T


LAYERS = {
    "blocks.{i}.attn.query": "deit.encoder.layer.{i}.attention.attention.query",
    "blocks.{i}.attn.key": "deit.encoder.layer.{i}.attention.attention.key",
    "blocks.{i}.attn.value": "deit.encoder.layer.{i}.attention.attention.value",
    "blocks.{i}.attn.out": "deit.encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.mlp.fc1": "deit.encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.mlp.fc2": "deit.encoder.layer.{i}.output.dense",
    "head": "cls_classifier",
    "distilled": "distillation_classifier",
}
NORMS = {
    "blocks.{i}.norm1": "deit.encoder.layer.{i}.layernorm_before",
    "blocks.{i}.norm2": "deit.encoder.layer.{i}.layernorm_after",
    "norm": "deit.layernorm",
}
PATCH = "deit.embeddings.patch_embeddings.projection"
# The other families leave it to the engine to find parameters by their values.
PARAMETERS = (
    {f"{ours}.kernel": (f"{theirs}.weight", transposed) for ours, theirs in LAYERS.items()}
    | {f"{ours}.scale": f"{theirs}.weight" for ours, theirs in NORMS.items()}
    | {f"{ours}.bias": f"{theirs}.bias" for ours, theirs in (LAYERS | NORMS | {"embed.patch": PATCH}).items()}
    | {
        "embed.patch.kernel": (f"{PATCH}.weight", kernel_channels_first),
        "embed.cls": "deit.embeddings.cls_token",
        "embed.distillation": "deit.embeddings.distillation_token",
        "embed.positions": "deit.embeddings.position_embeddings",
    }
)


def draw(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
    config, shape = draw_vision(rng)
    config |= {"intermediate_size": int(rng.choice((1, 7, 16, 31))), "num_labels": int(rng.integers(2, 12))}
    return config, shape


FAMILY = Family(
    name="deit",
    build=build,
    model=Deit,
    sites=sites,
    config=CONFIG,
    shape=(12, 21),
    draw=draw,
    output=lambda returned: returned.logits,
    call=at_any_size,
    parameters=PARAMETERS,
)
reference, candidate, wrong = FAMILY.reference(), FAMILY.candidate(), FAMILY.mutants()
