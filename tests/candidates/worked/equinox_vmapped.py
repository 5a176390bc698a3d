"""A candidate in equinox: written for one image, channels first, and mapped over a batch.

Nothing can be observed inside `jax.vmap`. So the model returns its intermediates under the sites' own names, and needs
no table. `wrong` adds the positions before the cls token exists. `wrong_epsilon` leaves LayerNorm at equinox's own
epsilon.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

import vit_ref


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, heads: int, epsilon: float, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(width, eps=epsilon)
        self.attention = eqx.nn.MultiheadAttention(
            heads,
            width,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=keys[0],
        )
        self.norm2 = eqx.nn.LayerNorm(width, eps=epsilon)
        self.fc1 = eqx.nn.Linear(width, hidden, key=keys[1])
        self.fc2 = eqx.nn.Linear(hidden, width, key=keys[2])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen = {"norm1": (y := jax.vmap(self.norm1)(x))}
        seen["attn.out"] = y = self.attention(y, y, y)
        seen["attn.residual"] = x = x + y
        seen["norm2"] = y = jax.vmap(self.norm2)(x)
        seen["mlp.fc1"] = y = jax.vmap(self.fc1)(y)
        seen["mlp.hidden"] = y = jax.nn.gelu(y, approximate=False)
        seen["mlp.out"] = y = jax.vmap(self.fc2)(y)
        seen["mlp.residual"] = x = x + y
        return x, seen


class VisionTransformer(eqx.Module):
    patch: eqx.nn.Conv2d
    cls_token: jax.Array
    positions: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    cls_has_position: bool

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        patches = self.patch(image)
        seen = {"patches": (x := patches.reshape(len(patches), -1).T)}
        if self.cls_has_position:
            x = jnp.concatenate([self.cls_token, x]) + self.positions
        else:
            x = jnp.concatenate([self.cls_token, x + self.positions[1:]])
        seen["embeddings"] = x
        for i, block in enumerate(self.blocks):
            x, inside = block(x)
            seen |= {f"block.{i}.{site}": value for site, value in inside.items()}
        seen["norm"] = x = jax.vmap(self.norm)(x)
        return self.head(x[0]), seen


def load(checkpoint: Path, *, epsilon: float | None = None, cls_has_position: bool = True) -> VisionTransformer:
    """Returns the model, filled from the checkpoint; an epsilon of None is the checkpoint's."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    epsilon = config["layer_norm_eps"] if epsilon is None else epsilon
    kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    key = jax.random.key(0)
    blocks = [
        Block(width, config["intermediate_size"], config["num_attention_heads"], epsilon, key) for _ in range(depth)
    ]
    model = VisionTransformer(
        patch=eqx.nn.Conv2d(config["num_channels"], width, kernel.shape[2:], kernel.shape[2:], key=key),
        cls_token=jnp.asarray(tensors["vit.embeddings.cls_token"][0]),
        positions=jnp.asarray(tensors["vit.embeddings.position_embeddings"][0]),
        blocks=blocks,
        norm=eqx.nn.LayerNorm(width, eps=epsilon),
        head=eqx.nn.Linear(width, len(config["id2label"]), key=key),
        cls_has_position=cls_has_position,
    )

    def fill(model: VisionTransformer, where, name: str) -> VisionTransformer:
        # equinox keeps PyTorch's shapes, except that a convolution's bias has two more axes.
        layer = where(model)
        new = [jnp.asarray(tensors[f"{name}.{leaf}"]) for leaf in ("weight", "bias")]
        new[1] = new[1].reshape(layer.bias.shape)
        return eqx.tree_at(lambda m: [where(m).weight, where(m).bias], model, new)

    model = fill(model, lambda m: m.patch, "vit.embeddings.patch_embeddings.projection")
    for i in range(depth):
        layer = f"vit.encoder.layer.{i}"
        model = fill(model, lambda m, i=i: m.blocks[i].norm1, f"{layer}.layernorm_before")
        for theirs, ours in (("query", "query_proj"), ("key", "key_proj"), ("value", "value_proj")):
            name = f"{layer}.attention.attention.{theirs}"
            model = fill(model, lambda m, i=i, ours=ours: getattr(m.blocks[i].attention, ours), name)
        model = fill(model, lambda m, i=i: m.blocks[i].attention.output_proj, f"{layer}.attention.output.dense")
        model = fill(model, lambda m, i=i: m.blocks[i].norm2, f"{layer}.layernorm_after")
        model = fill(model, lambda m, i=i: m.blocks[i].fc1, f"{layer}.intermediate.dense")
        model = fill(model, lambda m, i=i: m.blocks[i].fc2, f"{layer}.output.dense")
    model = fill(model, lambda m: m.norm, "vit.layernorm")
    return fill(model, lambda m: m.head, "classifier")


PARAMETERS = {"cls_token": "cls_token", "positions": "position_embeddings"}
for theirs, ours in {
    "patch": "patch",
    "blocks.{i}.norm1": "blocks.{i}.norm1",
    "blocks.{i}.attention.query_proj": "blocks.{i}.attn.query",
    "blocks.{i}.attention.key_proj": "blocks.{i}.attn.key",
    "blocks.{i}.attention.value_proj": "blocks.{i}.attn.value",
    "blocks.{i}.attention.output_proj": "blocks.{i}.attn.out",
    "blocks.{i}.norm2": "blocks.{i}.norm2",
    "blocks.{i}.fc1": "blocks.{i}.mlp.fc1",
    "blocks.{i}.fc2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
    "head": "head",
}.items():
    # Linear's weight is (out, in) and the convolution's (out, in, height, width). This package's are (..., in, out).
    moved = (lambda w: w.transpose(2, 3, 1, 0)) if ours == "patch" else (lambda w: w.T)
    weight = f"{ours}.scale" if "norm" in ours else (f"{ours}.kernel", moved)
    PARAMETERS |= {f"{theirs}.weight": weight, f"{theirs}.bias": f"{ours}.bias"}

candidate = vit_ref.Candidate(
    load=load, parameters=PARAMETERS, channels_first=True, call=lambda model, images: jax.vmap(model)(images)
)
wrong = dataclasses.replace(candidate, load=partial(load, cls_has_position=False))
wrong_epsilon = dataclasses.replace(candidate, load=partial(load, epsilon=1e-5))
