"""A candidate in PyTorch in timm's style: one linear layer for query, key and value.

`wrong` splits the output of that layer in the wrong order. `wrong_mode` is never put into evaluation mode, so its
dropout is active. `fused` has PyTorch's fused attention, timm's default, which shows no probabilities.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import vit_ref


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, split_in_order: bool):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.split_in_order = split_in_order
        self.fused = False
        self.qkv = nn.Linear(width, 3 * width)
        # Some models normalise here. In this one these layers only show which query and key are used.
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        if self.split_in_order:
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            qkv = self.qkv(x).reshape(batch, tokens, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            context = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj(context.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: dict, split_in_order: bool):
        super().__init__()
        width, epsilon = config["hidden_size"], config["layer_norm_eps"]
        dropout = config["attention_probs_dropout_prob"]
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = Attention(width, config["num_attention_heads"], dropout, split_in_order)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = Mlp(width, config["intermediate_size"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, config: dict, patch: tuple[int, int], tokens: int, split_in_order: bool):
        super().__init__()
        width = config["hidden_size"]
        self.patch_embed = nn.Conv2d(config["num_channels"], width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.pos_drop = nn.Dropout(config["hidden_dropout_prob"])
        self.blocks = nn.Sequential(*(Block(config, split_in_order) for _ in range(config["num_hidden_layers"])))
        self.norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.head = nn.Linear(width, len(config["id2label"]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(self.pos_drop(x + self.pos_embed))
        return self.head(self.norm(x)[:, 0])


RENAMED = (
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection", "patch_embed"),
    ("vit.encoder.layer", "blocks"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("vit.layernorm", "norm"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("classifier", "head"),
)


def load(
    checkpoint: Path, *, split_in_order: bool = True, evaluated: bool = True, fused: bool = False
) -> VisionTransformer:
    """Returns the model, filled from the checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    for i in range(config["num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            roles = [tensors.pop(f"blocks.{i}.attention.attention.{role}.{leaf}") for role in ("query", "key", "value")]
            tensors[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(roles)
    patch, tokens = tensors["patch_embed.weight"].shape[2:], tensors["pos_embed"].shape[1]
    model = VisionTransformer(config, tuple(patch), tokens, split_in_order)
    model.load_state_dict(tensors)
    for block in model.blocks:
        block.attn.fused = fused
    return model.eval() if evaluated else model


def chunk(k: int) -> Callable:
    """Returns a selection of the query (0), key (1) or value (2) from a value that fuses them on the last axis."""
    return lambda x: x[..., k * (x.shape[-1] // 3) : (k + 1) * (x.shape[-1] // 3)]


SITES = {
    "patch_embed": ("patches", lambda x: x.flatten(2).swapaxes(1, 2)),
    "pos_drop": "embeddings",
    "blocks.{i}.norm1": "block.{i}.norm1",
    "blocks.{i}.attn.q_norm": ("block.{i}.attn.query", lambda x: x.swapaxes(1, 2)),
    "blocks.{i}.attn.k_norm": ("block.{i}.attn.key", lambda x: x.swapaxes(1, 2)),
    "blocks.{i}.attn.qkv": ("block.{i}.attn.value", chunk(2)),
    "blocks.{i}.attn.attn_drop:input": "block.{i}.attn.probs",
    "blocks.{i}.attn.proj:input": "block.{i}.attn.context",
    "blocks.{i}.attn.proj": "block.{i}.attn.out",
    "blocks.{i}.norm2:input": "block.{i}.attn.residual",
    "blocks.{i}.norm2": "block.{i}.norm2",
    "blocks.{i}.mlp.fc1": "block.{i}.mlp.fc1",
    "blocks.{i}.mlp.act": "block.{i}.mlp.hidden",
    "blocks.{i}.mlp": "block.{i}.mlp.out",
    "blocks.{i}": "block.{i}.mlp.residual",
    "norm": "norm",
}
PARAMETERS = {
    "cls_token": "cls_token",
    "pos_embed": "position_embeddings",
    "patch_embed.weight": ("patch.kernel", lambda w: w.transpose(2, 3, 1, 0)),
    "patch_embed.bias": "patch.bias",
    "blocks.{i}.attn.qkv.weight": [
        (f"blocks.{{i}}.attn.{role}.kernel", lambda w, k=k: chunk(k)(w.T))
        for k, role in enumerate(("query", "key", "value"))
    ],
    "blocks.{i}.attn.qkv.bias": [
        (f"blocks.{{i}}.attn.{role}.bias", chunk(k)) for k, role in enumerate(("query", "key", "value"))
    ],
}
for theirs, ours in {"attn.proj": "attn.out", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
    PARAMETERS[f"blocks.{{i}}.{theirs}.weight"] = (f"blocks.{{i}}.{ours}.kernel", lambda w: w.T)
    PARAMETERS[f"blocks.{{i}}.{theirs}.bias"] = f"blocks.{{i}}.{ours}.bias"
for norm in ("blocks.{i}.norm1", "blocks.{i}.norm2", "norm"):
    PARAMETERS |= {f"{norm}.weight": f"{norm}.scale", f"{norm}.bias": f"{norm}.bias"}
PARAMETERS |= {"head.weight": ("head.kernel", lambda w: w.T), "head.bias": "head.bias"}

candidate = vit_ref.Candidate(load=load, sites=SITES, parameters=PARAMETERS)
wrong = dataclasses.replace(candidate, load=partial(load, split_in_order=False))
wrong_mode = dataclasses.replace(candidate, load=partial(load, evaluated=False))
fused = dataclasses.replace(
    candidate,
    load=partial(load, fused=True),
    sites={path: seen for path, seen in SITES.items() if seen != "block.{i}.attn.probs"},
)
