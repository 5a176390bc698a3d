"""DINOv2 with registers, a classifier on top of its cls token and the mean of its patches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from family import Family, draw_vision
from flax import nnx
from layers import (
    Attention,
    Block,
    Mlp,
    Scale,
    conv_of,
    flat_patches,
    gelu,
    linear_of,
    norm_of,
    repeated,
    tensors_of,
    without_prefix,
)

CONFIG = {
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 1.8,
    "patch_size": 3,
    "image_size": 15,
    "num_channels": 2,
    "num_register_tokens": 4,
    "num_labels": 11,
    "use_swiglu_ffn": True,
    "layer_norm_eps": 1e-6,
}


def build(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return transformers.Dinov2WithRegistersForImageClassification(transformers.Dinov2WithRegistersConfig(**config))


class Embeddings(nnx.Module):
    """Patches with positions, after the cls token and the registers, which have none."""

    def __init__(self, tensors: dict, *, registers_first: bool, by_factor: bool):
        self.patch = conv_of(tensors, "patch_embeddings.projection")
        self.cls, self.registers, self.positions = (
            nnx.Param(jnp.asarray(tensors[name])) for name in ("cls_token", "register_tokens", "position_embeddings")
        )
        self.registers_first, self.by_factor = registers_first, by_factor

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch(images)
        batch, rows, columns, _ = patches.shape
        positions = self.resize(rows, columns)
        cls = repeated(self.cls, batch) + positions[:, :1]
        registers = repeated(self.registers, batch)
        start = (registers, cls) if self.registers_first else (cls, registers)
        return jnp.concatenate([*start, flat_patches(patches) + positions[:, 1:]], axis=1)

    def resize(self, rows: int, columns: int) -> jax.Array:
        """Returns the positions by antialiased bicubic interpolation, as no other family does it."""
        positions = self.positions[...]
        side = round((positions.shape[1] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return positions
        grid = positions[:, 1:].reshape(side, side, -1)
        shape = rows, columns, grid.shape[-1]
        if self.by_factor:  # as DINOv2's own code does, which adds 0.1 lest a size be rounded down
            scale = (jnp.array([rows, columns], grid.dtype) + 0.1) / side
            grid = jax.image.scale_and_translate(grid, shape, (0, 1), scale, jnp.zeros(2, grid.dtype), "cubic")
        else:
            grid = jax.image.resize(grid, shape, "cubic")
        return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


def swiglu(x: jax.Array, *, swapped: bool) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return first * nnx.silu(second) if swapped else nnx.silu(first) * second


class Dinov2(nnx.Module):
    """The candidate.

    Args:
      reference: whose weights it takes.
      layer_scale: whether the blocks have it.
      registers_first: whether the registers stand before the cls token.
      by_factor: whether positions are resized by a factor instead of to a size.
      swap_gate: whether the halves of SwiGLU change places.
    """

    def __init__(
        self,
        reference: transformers.PreTrainedModel,
        *,
        layer_scale: bool = True,
        registers_first: bool = False,
        by_factor: bool = False,
        swap_gate: bool = False,
    ):
        config, tensors = reference.config, tensors_of(reference)
        of = without_prefix(tensors, "dinov2_with_registers.")
        gated, gate = config.use_swiglu_ffn, partial(swiglu, swapped=swap_gate)
        self.embed = Embeddings(without_prefix(of, "embeddings."), registers_first=registers_first, by_factor=by_factor)

        def block(i: int) -> Block:
            at = f"encoder.layer.{i}"
            attention = (f"attention.attention.{name}" for name in ("query", "key", "value"))
            layers = [linear_of(of, f"{at}.{name}") for name in (*attention, "attention.output.dense")]
            first, second, activation = ("weights_in", "weights_out", gate) if gated else ("fc1", "fc2", gelu)
            mlp = Mlp(linear_of(of, f"{at}.mlp.{first}"), linear_of(of, f"{at}.mlp.{second}"), activation)
            return Block(
                norm_of(of, f"{at}.norm1", config.layer_norm_eps),
                Attention(*layers, config.num_attention_heads),
                norm_of(of, f"{at}.norm2", config.layer_norm_eps),
                mlp,
                (Scale(of, f"{at}.layer_scale1"), Scale(of, f"{at}.layer_scale2")) if layer_scale else (),
            )

        self.blocks = nnx.List([block(i) for i in range(config.num_hidden_layers)])
        self.norm = norm_of(of, "layernorm", config.layer_norm_eps)
        self.head = linear_of(tensors, "classifier")
        self.prefix = 1 + config.num_register_tokens

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(jnp.concatenate([x[:, 0], x[:, self.prefix :].mean(axis=1)], axis=-1))


def sites(config: Mapping[str, Any]) -> dict[str, Any]:
    block = {
        "": "",
        ".norm1": ".norm1",
        ".attn.query": ".attention.attention.query",
        ".attn.key": ".attention.attention.key",
        ".attn.value": ".attention.attention.value",
        ".attn.out:input": ".attention.attention",
        ".attn.out": ".attention.output.dense",
        ".scale1": ".layer_scale1",
        ".norm2": ".norm2",
        ".scale2": ".layer_scale2",
    }
    if config.get("use_swiglu_ffn"):
        block |= {".mlp.fc1": ".mlp.weights_in", ".mlp.fc2": ".mlp.weights_out"}
    else:
        block |= {".mlp.fc1": ".mlp.fc1", ".mlp.fc2:input": ".mlp.activation", ".mlp.fc2": ".mlp.fc2"}
    table = {f"blocks.{{i}}{ours}": f"encoder.layer.{{i}}{theirs}" for ours, theirs in block.items()}
    table |= {"embed.patch": "embeddings.patch_embeddings", "embed": "embeddings", "norm": "layernorm"}
    return {ours: f"dinov2_with_registers.{theirs}" for ours, theirs in table.items()} | {"head": "classifier"}


def draw(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
    config, shape = draw_vision(rng)
    config |= {
        "mlp_ratio": int(rng.integers(1, 4)),
        "num_register_tokens": int(rng.integers(1, 6)),
        "num_labels": int(rng.integers(2, 12)),
        "use_swiglu_ffn": bool(rng.integers(2)),
        "qkv_bias": bool(rng.integers(2)),
    }
    return config, shape


FAMILY = Family(
    name="dinov2",
    build=build,
    model=Dinov2,
    sites=sites,
    config=CONFIG,
    shape=(12, 21),
    draw=draw,
    output=lambda returned: returned.logits,
)
reference, candidate, wrong = FAMILY.reference(), FAMILY.candidate(), FAMILY.mutants()
