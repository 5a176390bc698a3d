"""The ViT of jax-ml/bonsai as a candidate: how to load it, and where its sites are. Nothing of bonsai is edited.

    pip install 'git+https://github.com/jax-ml/bonsai'
    vit-ref verify CHECKPOINT --candidate examples/bonsai_vit.py

`docs/guides/demonstration.md` shows the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import vit_ref

if TYPE_CHECKING:
    from flax import nnx


def load(checkpoint: Path) -> nnx.Module:
    """Builds bonsai's ViT of the checkpoint's size, and fills it by bonsai's own loader."""
    try:
        from bonsai.models.vit import modeling, params
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("bonsai"):
            raise
        # The name bonsai alone belongs to another project, which has no models.
        raise ImportError(
            f"there is no module {error.name}: pip install 'git+https://github.com/jax-ml/bonsai'"
        ) from error
    config = vit_ref.ViTConfig.from_hf(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    theirs = modeling.ModelConfig(
        image_size=config.image_hw,
        patch_size=config.patch_hw,
        num_channels=config.num_channels,
        hidden_dim=config.hidden_size,
        attn_dropout_prob=config.attention_probs_dropout_prob,
        dropout_prob=config.hidden_dropout_prob,
        num_heads=config.num_attention_heads,
        mlp_dim=config.intermediate_size,
        eps=config.layer_norm_eps,
        num_layers=config.num_hidden_layers,
        num_labels=config.num_labels,
    )
    model: nnx.Module = params.create_vit_from_pretrained(str(checkpoint), theirs)
    model.eval()
    return model


# Attention's probabilities are computed inside `nnx.dot_product_attention`, where nothing outside can observe them.
SITES = {
    "pos_embeddings.projection": "patches",
    "pos_embeddings": "embeddings",
    "layers.{i}.layernorm_before": "block.{i}.norm1",
    "layers.{i}.attention.query": "block.{i}.attn.query",
    "layers.{i}.attention.key": "block.{i}.attn.key",
    "layers.{i}.attention.value": "block.{i}.attn.value",
    "layers.{i}.attention.out:input": "block.{i}.attn.context",
    "layers.{i}.attention.out": "block.{i}.attn.out",
    "layers.{i}.layernorm_after:input": "block.{i}.attn.residual",
    "layers.{i}.layernorm_after": "block.{i}.norm2",
    "layers.{i}.linear1": "block.{i}.mlp.fc1",
    "layers.{i}.linear2:input": "block.{i}.mlp.hidden",
    "layers.{i}.linear2": "block.{i}.mlp.out",
    "layers.{i}": "block.{i}.mlp.residual",
    "ln": "norm",
}
# Layers by their names in bonsai's model, and in this package's.
LAYERS = {
    "pos_embeddings.projection": "patch",
    "layers.{i}.layernorm_before": "blocks.{i}.norm1",
    "layers.{i}.attention.query": "blocks.{i}.attn.query",
    "layers.{i}.attention.key": "blocks.{i}.attn.key",
    "layers.{i}.attention.value": "blocks.{i}.attn.value",
    "layers.{i}.attention.out": "blocks.{i}.attn.out",
    "layers.{i}.layernorm_after": "blocks.{i}.norm2",
    "layers.{i}.linear1": "blocks.{i}.mlp.fc1",
    "layers.{i}.linear2": "blocks.{i}.mlp.fc2",
    "ln": "norm",
    "classifier": "head",
}
PARAMETERS = {
    "pos_embeddings.cls_token": "cls_token",
    "pos_embeddings.pos_embeddings": "position_embeddings",
}
for theirs, ours in LAYERS.items():
    weight = "scale" if "norm" in ours else "kernel"
    PARAMETERS |= {f"{theirs}.{weight}": f"{ours}.{weight}", f"{theirs}.bias": f"{ours}.bias"}

candidate = vit_ref.Candidate(
    load=load, sites=SITES, parameters=PARAMETERS, call=lambda model, images: model(images, rngs=None)
)
