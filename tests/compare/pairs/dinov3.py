"""DINOv3's ViT: registers, LayerScale, and RoPE over two axes in place of positions."""

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
    GatedMlp,
    Mlp,
    Scale,
    Tensors,
    conv_of,
    flat_patches,
    gelu,
    linear_of,
    map_channels_last,
    norm_of,
    repeated,
    rotated,
    spread,
    tensors_of,
    without_prefix,
)

CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "patch_size": 3,
    "image_size": 15,
    "num_channels": 2,
    "num_register_tokens": 4,
    "layer_norm_eps": 1e-5,
}


def build(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**config))


class Embeddings(nnx.Module):
    """The cls token, the registers and the patches, without positions."""

    def __init__(self, tensors: Tensors):
        self.patch = conv_of(tensors, "patch_embeddings")
        self.cls, self.registers = (nnx.Param(jnp.asarray(tensors[name])) for name in ("cls_token", "register_tokens"))

    def __call__(self, images: jax.Array) -> jax.Array:
        start = (repeated(token, len(images)) for token in (self.cls, self.registers))
        return jnp.concatenate([*start, flat_patches(self.patch(images))], axis=1)


class Rope(nnx.Module):
    """Cosine and sine of the angles that a patch's row and column stand for."""

    def __init__(self, frequencies: np.ndarray, *, interleaved: bool):
        self.frequencies, self.interleaved = nnx.Variable(jnp.asarray(frequencies)), interleaved

    def __call__(self, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        frequencies = self.frequencies[...]
        centres = ((jnp.arange(size, dtype=frequencies.dtype) + 0.5) / size * 2 - 1 for size in grid)
        places = jnp.stack(jnp.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
        angles = 2 * jnp.pi * places * frequencies[None, None]
        return spread(angles.reshape(len(places), -1), interleaved=self.interleaved)


class Dinov3(nnx.Module):
    """The candidate.

    Args:
      reference: whose weights it takes.
      interleaved: whether RoPE turns neighbours instead of halves.
      turn_registers: whether RoPE turns the registers, too, as if they were the first patches.
    """

    def __init__(
        self, reference: transformers.PreTrainedModel, *, interleaved: bool = False, turn_registers: bool = False
    ):
        config, of = reference.config, tensors_of(reference)
        self.embed = Embeddings(without_prefix(of, "embeddings."))
        self.rope = Rope(of["rope_embeddings.inv_freq"], interleaved=interleaved)

        def block(i: int) -> Block:
            at = f"layer.{i}"
            attention = [linear_of(of, f"{at}.attention.{name}_proj") for name in "qkvo"]
            mlp = {
                name: linear_of(of, f"{at}.mlp.{name}_proj")
                for name in ("gate", "up", "down")[not config.use_gated_mlp :]
            }
            return Block(
                norm_of(of, f"{at}.norm1", config.layer_norm_eps),
                Attention(*attention, config.num_attention_heads),
                norm_of(of, f"{at}.norm2", config.layer_norm_eps),
                (GatedMlp if config.use_gated_mlp else Mlp)(*mlp.values(), gelu),
                (Scale(of, f"{at}.layer_scale1"), Scale(of, f"{at}.layer_scale2")),
            )

        self.blocks = nnx.List([block(i) for i in range(config.num_hidden_layers)])
        self.norm = norm_of(of, "norm", config.layer_norm_eps)
        self.patch, self.registers, self.turn_registers = config.patch_size, config.num_register_tokens, turn_registers

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        cos, sin = self.rope((images.shape[1] // self.patch, images.shape[2] // self.patch))
        if self.turn_registers:
            cos, sin = (jnp.concatenate([each[: self.registers], each]) for each in (cos, sin))
        for block in self.blocks:
            x = block(x, rotate=partial(self.rotate, cos=cos, sin=sin))
        return self.norm(x)

    def rotate(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Turns the last tokens, of which there are as many as angles."""
        start = x.shape[1] - len(cos)
        turned = rotated(x[:, start:], cos, sin, interleaved=self.rope.interleaved)
        return jnp.concatenate([x[:, :start], turned], axis=1)


def sites(config: Mapping[str, Any]) -> dict[str, Any]:
    block = {
        "": "",
        ".norm1": ".norm1",
        ".attn.query": ".attention.q_proj",
        ".attn.key": ".attention.k_proj",
        ".attn.value": ".attention.v_proj",
        ".attn": ".attention.o_proj",
        ".scale1": ".layer_scale1",
        ".norm2": ".norm2",
        ".scale2": ".layer_scale2",
    }
    if config.get("use_gated_mlp"):
        block |= {f".mlp.{name}": f".mlp.{name}_proj" for name in ("gate", "up", "down")}
    else:
        block |= {".mlp.fc1": ".mlp.up_proj", ".mlp.fc2:input": ".mlp.act_fn", ".mlp.fc2": ".mlp.down_proj"}
    return {f"blocks.{{i}}{ours}": f"layer.{{i}}{theirs}" for ours, theirs in block.items()} | {
        "embed.patch": ("embeddings.patch_embeddings", map_channels_last),
        "embed": "embeddings",
        "rope[0]": "rope_embeddings",
        "rope[1]": "rope_embeddings:1",
        "norm": "norm",
    }


def draw(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[int, ...]]:
    config, shape = draw_vision(rng, head_dims=(4, 8, 12))
    config |= {
        "intermediate_size": int(rng.choice((1, 7, 16, 31))),
        "num_register_tokens": int(rng.integers(6)),
        "rope_theta": float(rng.choice((10, 100, 10000))),
        "use_gated_mlp": bool(rng.integers(2)),
        **{f"{name}_bias": bool(rng.integers(2)) for name in ("query", "key", "value", "proj", "mlp")},
    }
    return config, shape


FAMILY = Family(
    name="dinov3",
    build=build,
    model=Dinov3,
    sites=sites,
    config=CONFIG,
    shape=(12, 21),
    draw=draw,
    output=lambda returned: returned.last_hidden_state,
)
reference, candidate, wrong = FAMILY.reference(), FAMILY.candidate(), FAMILY.mutants()
