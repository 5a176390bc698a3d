"""A candidate in linen, with the modules, names and shapes of big_vision and google-research's vision_transformer.

linen's attention keeps heads on an axis of their own, so PyTorch's kernels must be reshaped. `wrong` reshapes the
kernel that merges the heads in the wrong order: right shapes, wrong numbers. `wrong_epsilon` has linen's default.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file

import vit_ref


class MlpBlock(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.hidden)(x), approximate=False)
        return nn.Dense(width)(x)


class Encoder1DBlock(nn.Module):
    heads: int
    hidden: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(epsilon=self.epsilon)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads, deterministic=True)(y, y)
        y = nn.LayerNorm(epsilon=self.epsilon)(x)
        return x + MlpBlock(self.hidden)(y)


class VisionTransformer(nn.Module):
    patch: tuple[int, int]
    width: int
    depth: int
    heads: int
    hidden: int
    classes: int
    epsilon: float

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, self.patch, strides=self.patch, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, self.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.depth):
            x = Encoder1DBlock(self.heads, self.hidden, self.epsilon, name=f"encoderblock_{i}")(x)
        x = nn.LayerNorm(epsilon=self.epsilon, name="encoder_norm")(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])


def load(
    checkpoint: Path, *, epsilon: float | None = None, merged_in_order: bool = True
) -> tuple[VisionTransformer, dict]:
    """Returns the module and its variables; an epsilon of None is the checkpoint's."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    heads, width = config["num_attention_heads"], config["hidden_size"]

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def split(name: str) -> dict[str, np.ndarray]:
        layer = dense(name)
        return {"kernel": layer["kernel"].reshape(width, heads, -1), "bias": layer["bias"].reshape(heads, -1)}

    def merge(name: str) -> dict[str, np.ndarray]:
        layer = dense(name)
        if merged_in_order:
            kernel = layer["kernel"].reshape(heads, -1, width)
        else:
            kernel = layer["kernel"].reshape(-1, heads, width).swapaxes(0, 1)
        return {"kernel": kernel, "bias": layer["bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def block(name: str) -> dict:
        attention = f"{name}.attention"
        return {
            "LayerNorm_0": norm(f"{name}.layernorm_before"),
            "MultiHeadDotProductAttention_0": {
                **{role: split(f"{attention}.attention.{role}") for role in ("query", "key", "value")},
                "out": merge(f"{attention}.output.dense"),
            },
            "LayerNorm_1": norm(f"{name}.layernorm_after"),
            "MlpBlock_0": {"Dense_0": dense(f"{name}.intermediate.dense"), "Dense_1": dense(f"{name}.output.dense")},
        }

    patch = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    depth = config["num_hidden_layers"]
    params = {
        "embedding": {
            "kernel": patch.transpose(2, 3, 1, 0),
            "bias": tensors["vit.embeddings.patch_embeddings.projection.bias"],
        },
        "cls": tensors["vit.embeddings.cls_token"],
        "pos_embedding": tensors["vit.embeddings.position_embeddings"],
        **{f"encoderblock_{i}": block(f"vit.encoder.layer.{i}") for i in range(depth)},
        "encoder_norm": norm("vit.layernorm"),
        "head": dense("classifier"),
    }
    epsilon = config["layer_norm_eps"] if epsilon is None else epsilon
    classes = len(config["id2label"])
    module = VisionTransformer(patch.shape[2:], width, depth, heads, config["intermediate_size"], classes, epsilon)
    return module, {"params": params}


# The sites are outputs of submodules, and inputs of the next submodules.
_B, _A = "encoderblock_{i}", "encoderblock_{i}.MultiHeadDotProductAttention_0"
SITES = {
    "embedding": "patches",
    "encoderblock_0:input": "embeddings",
    f"{_B}.LayerNorm_0": "block.{i}.norm1",
    f"{_A}.query": "block.{i}.attn.query",
    f"{_A}.key": "block.{i}.attn.key",
    f"{_A}.value": "block.{i}.attn.value",
    f"{_A}.out:input": "block.{i}.attn.context",
    f"{_A}.out": "block.{i}.attn.out",
    f"{_B}.LayerNorm_1:input": "block.{i}.attn.residual",
    f"{_B}.LayerNorm_1": "block.{i}.norm2",
    f"{_B}.MlpBlock_0.Dense_0": "block.{i}.mlp.fc1",
    f"{_B}.MlpBlock_0.Dense_1:input": "block.{i}.mlp.hidden",
    f"{_B}.MlpBlock_0": "block.{i}.mlp.out",
    _B: "block.{i}.mlp.residual",
    "encoder_norm": "norm",
    "head": "logits",
}
PARAMETERS = {"cls": "cls_token", "pos_embedding": "position_embeddings"}
for theirs, ours in {
    "embedding": "patch",
    f"{_B}.LayerNorm_0": "blocks.{i}.norm1",
    **{f"{_A}.{role}": f"blocks.{{i}}.attn.{role}" for role in ("query", "key", "value", "out")},
    f"{_B}.LayerNorm_1": "blocks.{i}.norm2",
    f"{_B}.MlpBlock_0.Dense_0": "blocks.{i}.mlp.fc1",
    f"{_B}.MlpBlock_0.Dense_1": "blocks.{i}.mlp.fc2",
    "encoder_norm": "norm",
    "head": "head",
}.items():
    weight = "scale" if "norm" in ours else "kernel"
    PARAMETERS |= {f"{theirs}.{weight}": f"{ours}.{weight}", f"{theirs}.bias": f"{ours}.bias"}

candidate = vit_ref.Candidate(load=load, sites=SITES, parameters=PARAMETERS)
wrong = dataclasses.replace(candidate, load=partial(load, merged_in_order=False))
wrong_epsilon = dataclasses.replace(candidate, load=partial(load, epsilon=1e-6))
