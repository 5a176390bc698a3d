"""A candidate in the style of Flax's own tutorial on ViTs (flax.readthedocs.io, examples/vit_training).

It is built from `nnx.MultiHeadAttention` and `nnx.Sequential`. `wrong` is as the tutorial has it. It computes the tanh
form of GELU, which is what `nnx.gelu` is, and LayerNorm with flax's epsilon, whatever the checkpoint was trained with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.numpy import load_file

import vit_ref


class EncoderBlock(nnx.Module):
    def __init__(self, width: int, hidden: int, heads: int, epsilon: float, gelu: Callable, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads, in_features=width, dropout_rate=0.1, decode=False, deterministic=True, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, hidden, rngs=rngs),
            gelu,
            nnx.Dropout(0.1, deterministic=True),
            nnx.Linear(hidden, width, rngs=rngs),
            nnx.Dropout(0.1, deterministic=True),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    def __init__(self, config: dict, patch: tuple[int, int], tokens: int, epsilon: float, gelu: Callable):
        rngs = nnx.Rngs(0)
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.patch_embeddings = nnx.Conv(
            config["num_channels"], width, kernel_size=patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.position_embeddings = nnx.Param(jnp.zeros((1, tokens, width)))
        self.dropout = nnx.Dropout(0.1, deterministic=True)
        self.encoder = nnx.Sequential(
            *(
                EncoderBlock(width, config["intermediate_size"], heads, epsilon, gelu, rngs)
                for _ in range(config["num_hidden_layers"])
            )
        )
        self.final_norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.classifier = nnx.Linear(width, len(config["id2label"]), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch_embeddings(images)
        batch, _, _, width = patches.shape
        cls_token = jnp.tile(self.cls_token[...], (batch, 1, 1))
        x = jnp.concatenate([cls_token, patches.reshape(batch, -1, width)], axis=1)
        x = self.encoder(self.dropout(x + self.position_embeddings[...]))
        return self.classifier(self.final_norm(x)[:, 0])


erf_gelu = partial(nnx.gelu, approximate=False)


def load(checkpoint: Path, *, epsilon: float | None = None, gelu: Callable = erf_gelu) -> VisionTransformer:
    """Returns the model, filled from the checkpoint; an epsilon of None is the checkpoint's."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    positions = tensors["vit.embeddings.position_embeddings"]
    model = VisionTransformer(
        config, kernel.shape[2:], positions.shape[1], config["layer_norm_eps"] if epsilon is None else epsilon, gelu
    )

    def fill(layer: nnx.Module, name: str) -> None:
        # PyTorch's kernels are (out, in) and (out, in, height, width). Attention keeps heads on an axis of their own.
        weight = tensors[f"{name}.weight"]
        target = layer.scale if isinstance(layer, nnx.LayerNorm) else layer.kernel
        target[...] = (weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T).reshape(target.shape)
        layer.bias[...] = tensors[f"{name}.bias"].reshape(layer.bias.shape)

    model.cls_token[...] = tensors["vit.embeddings.cls_token"]
    model.position_embeddings[...] = positions
    fill(model.patch_embeddings, "vit.embeddings.patch_embeddings.projection")
    for i, block in enumerate(model.encoder.layers):
        layer = f"vit.encoder.layer.{i}"
        fill(block.norm1, f"{layer}.layernorm_before")
        for name in ("query", "key", "value"):
            fill(getattr(block.attention, name), f"{layer}.attention.attention.{name}")
        fill(block.attention.out, f"{layer}.attention.output.dense")
        fill(block.norm2, f"{layer}.layernorm_after")
        fill(block.mlp.layers[0], f"{layer}.intermediate.dense")
        fill(block.mlp.layers[3], f"{layer}.output.dense")
    fill(model.final_norm, "vit.layernorm")
    fill(model.classifier, "classifier")
    return model


# The sites. Attention's probabilities are computed inside `nnx.dot_product_attention`, where they cannot be observed.
SITES = {
    "patch_embeddings": "patches",
    "dropout": "embeddings",
    "encoder.layers.{i}.norm1": "block.{i}.norm1",
    "encoder.layers.{i}.attention.query": "block.{i}.attn.query",
    "encoder.layers.{i}.attention.key": "block.{i}.attn.key",
    "encoder.layers.{i}.attention.value": "block.{i}.attn.value",
    "encoder.layers.{i}.attention.out:input": "block.{i}.attn.context",
    "encoder.layers.{i}.attention.out": "block.{i}.attn.out",
    "encoder.layers.{i}.norm2:input": "block.{i}.attn.residual",
    "encoder.layers.{i}.norm2": "block.{i}.norm2",
    "encoder.layers.{i}.mlp.layers.0": "block.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.layers.3:input": "block.{i}.mlp.hidden",
    "encoder.layers.{i}.mlp": "block.{i}.mlp.out",
    "encoder.layers.{i}": "block.{i}.mlp.residual",
    "final_norm": "norm",
}
_LAYERS = {
    "patch_embeddings": "patch",
    "encoder.layers.{i}.norm1": "blocks.{i}.norm1",
    "encoder.layers.{i}.attention.query": "blocks.{i}.attn.query",
    "encoder.layers.{i}.attention.key": "blocks.{i}.attn.key",
    "encoder.layers.{i}.attention.value": "blocks.{i}.attn.value",
    "encoder.layers.{i}.attention.out": "blocks.{i}.attn.out",
    "encoder.layers.{i}.norm2": "blocks.{i}.norm2",
    "encoder.layers.{i}.mlp.layers.0": "blocks.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.layers.3": "blocks.{i}.mlp.fc2",
    "final_norm": "norm",
    "classifier": "head",
}
PARAMETERS = {"cls_token": "cls_token", "position_embeddings": "position_embeddings"}
for theirs, ours in _LAYERS.items():
    weight = "scale" if "norm" in ours else "kernel"
    PARAMETERS |= {f"{theirs}.{weight}": f"{ours}.{weight}", f"{theirs}.bias": f"{ours}.bias"}

candidate = vit_ref.Candidate(load=load, sites=SITES, parameters=PARAMETERS)
wrong = dataclasses.replace(candidate, load=partial(load, epsilon=1e-6, gelu=nnx.gelu))
wrong_gelu = dataclasses.replace(candidate, load=partial(load, gelu=nnx.gelu))
