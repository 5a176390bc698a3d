"""A candidate in plain JAX: a function of parameters and images, whose blocks are stacked and scanned.

The scan returns its values of each block, stacked on the first axis. `wrong` stacks the blocks in the order of their
sorted names, in which 10 comes before 2.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import vit_ref


def layer_norm(p: Mapping, x: jax.Array, epsilon: float) -> jax.Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * p["scale"] + p["bias"]


def linear(p: Mapping, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def forward(params: Mapping, images: jax.Array, *, heads: int, epsilon: float) -> tuple[jax.Array, dict]:
    batch, height, width, channels = images.shape
    rows, columns = params["patch"]["kernel"].shape[:2]
    x = images.reshape(batch, height // rows, rows, width // columns, columns, channels).swapaxes(2, 3)
    kernel = params["patch"]["kernel"].reshape(rows * columns * channels, -1)
    patches = x.reshape(batch, -1, len(kernel)) @ kernel + params["patch"]["bias"]
    cls = jnp.broadcast_to(params["cls"], (batch, 1, patches.shape[-1]))
    embeddings = jnp.concatenate([cls, patches], axis=1) + params["positions"]

    def block(x: jax.Array, p: Mapping) -> tuple[jax.Array, dict]:
        tokens = x.shape[1]
        norm1 = layer_norm(p["norm1"], x, epsilon)
        query, key, value = (linear(p[role], norm1).reshape(batch, tokens, heads, -1) for role in "qkv")
        scores = jnp.einsum("bqhk,bmhk->bhqm", query, key) / np.sqrt(query.shape[-1])
        probs = jax.nn.softmax(scores)
        context = jnp.einsum("bhqm,bmhk->bqhk", probs, value).reshape(x.shape)
        x = x + linear(p["o"], context)
        hidden = jax.nn.gelu(linear(p["fc1"], layer_norm(p["norm2"], x, epsilon)), approximate=False)
        after = x + linear(p["fc2"], hidden)
        seen = {"norm1": norm1, "query": query, "key": key, "value": value, "probs": probs, "context": context}
        return after, {**seen, "attended": x, "hidden": hidden, "after": after}

    x, seen = jax.lax.scan(block, embeddings, params["blocks"])
    norm = layer_norm(params["norm"], x, epsilon)
    return linear(params["head"], norm[:, 0]), {"patches": patches, "embeddings": embeddings, "norm": norm, **seen}


LAYERS = {
    "norm1": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def load(checkpoint: Path, *, counted: bool = True) -> tuple[Callable, dict]:
    """Returns the function and its parameters, filled from the checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")

    def layer(name: str) -> dict[str, np.ndarray]:
        weight = tensors[f"{name}.weight"]
        kind = "scale" if weight.ndim == 1 else "kernel"
        return {kind: weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T, "bias": tensors[f"{name}.bias"]}

    names = [f"vit.encoder.layer.{i}" for i in range(config["num_hidden_layers"])]
    names = names if counted else sorted(names)
    blocks = [{ours: layer(f"{name}.{theirs}") for ours, theirs in LAYERS.items()} for name in names]
    params = {
        "patch": layer("vit.embeddings.patch_embeddings.projection"),
        "cls": tensors["vit.embeddings.cls_token"],
        "positions": tensors["vit.embeddings.position_embeddings"],
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "norm": layer("vit.layernorm"),
        "head": layer("classifier"),
    }
    return partial(forward, heads=config["num_attention_heads"], epsilon=config["layer_norm_eps"]), params


# A key without {i} is a value stacked over the blocks.
SITES = {
    "patches": "patches",
    "embeddings": "embeddings",
    "norm1": "block.{i}.norm1",
    "query": "block.{i}.attn.query",
    "key": "block.{i}.attn.key",
    "value": "block.{i}.attn.value",
    "probs": "block.{i}.attn.probs",
    "context": "block.{i}.attn.context",
    "attended": "block.{i}.attn.residual",
    "hidden": "block.{i}.mlp.hidden",
    "after": "block.{i}.mlp.residual",
    "norm": "norm",
}
PARAMETERS = {"cls": "cls_token", "positions": "position_embeddings"}
for theirs, ours in {
    "patch": "patch",
    "blocks.norm1": "blocks.{i}.norm1",
    "blocks.q": "blocks.{i}.attn.query",
    "blocks.k": "blocks.{i}.attn.key",
    "blocks.v": "blocks.{i}.attn.value",
    "blocks.o": "blocks.{i}.attn.out",
    "blocks.norm2": "blocks.{i}.norm2",
    "blocks.fc1": "blocks.{i}.mlp.fc1",
    "blocks.fc2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
    "head": "head",
}.items():
    weight = "scale" if "norm" in ours else "kernel"
    PARAMETERS |= {f"{theirs}.{weight}": f"{ours}.{weight}", f"{theirs}.bias": f"{ours}.bias"}

candidate = vit_ref.Candidate(load=load, sites=SITES, parameters=PARAMETERS)
wrong = dataclasses.replace(candidate, load=partial(load, counted=False))
