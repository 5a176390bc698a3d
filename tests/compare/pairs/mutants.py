"""The mutants of each family: the first site that diverges, and the cause that a report names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A deliberate bug.

    Attributes:
      keywords: arguments of the candidate's model.
      site: the first site that diverges.
      cause: the beginning of the cause that a report names; None if no cause explains the value.
      without: paths of the candidate's table that a model with this bug does not have, or does not show.
    """

    keywords: Mapping[str, Any]
    site: str
    cause: str | None = None
    without: tuple[str, ...] = ()


INTERLEAVED = {"interleaved": True}
TURNED = "rotary positions turn adjacent channels"
ROPE = ("rope[0]", "rope[1]")
DINOV2, SIGLIP, CLIP, LLAMA = "dinov2_with_registers", "vision_model", "vision_model", "model"
MUTANTS: dict[str, dict[str, Mutant]] = {
    "dinov2": {
        "layer_scale_dropped": Mutant(
            {"layer_scale": False},
            f"{DINOV2}.encoder.layer.0.norm2",
            f"at {DINOV2}.encoder.layer.0.layer_scale1, the value of {DINOV2}.encoder.layer.0.attention in its place",
            without=("blocks.{i}.scale1", "blocks.{i}.scale2"),
        ),
        "registers_first": Mutant(
            {"registers_first": True}, f"{DINOV2}.embeddings", "another order along the number 1 axis"
        ),
        "positions_by_factor": Mutant(
            {"by_factor": True},
            f"{DINOV2}.embeddings",
            f"{DINOV2}.embeddings.position_embeddings resized bicubic (-0.5), antialiased, border cut off, by a factor"
            " from the size + 0.1; right is bicubic (-0.5), antialiased, border cut off, to the size",
        ),
        "swiglu_swapped": Mutant(
            {"swap_gate": True},
            f"{DINOV2}.encoder.layer.0.mlp.weights_out",
            f"{DINOV2}.encoder.layer.0.mlp.weights_in used in another order: the two halves swapped",
        ),
    },
    "dinov3": {
        "rope_on_registers": Mutant(
            {"turn_registers": True},
            "layer.0.attention.o_proj",
            "rotary positions turn the 4 tokens before those that have them, as the first of these",
        ),
        "rope_interleaved": Mutant(INTERLEAVED, "rope_embeddings", "the channels interleaved, for halves"),
        "rope_interleaved_unseen": Mutant(INTERLEAVED, "layer.0.attention.o_proj", TURNED, without=ROPE),
    },
    "siglip": {
        "erf_gelu": Mutant({"erf": True}, f"{SIGLIP}.encoder.layers.0.mlp.activation_fn", "erf GELU for tanh GELU"),
        "pooling_without_residual": Mutant({"residual": False}, f"{SIGLIP}.head", f"{SIGLIP}.head.attention not added"),
    },
    "clip": {
        "gelu": Mutant({"exact": True}, f"{CLIP}.encoder.layers.0.mlp.activation_fn", "erf GELU for quick GELU"),
        "pre_norm_missed": Mutant(
            {"pre_norm": False},
            f"{CLIP}.encoder.layers.0.layer_norm1",
            f"at {CLIP}.pre_layrnorm, the value of {CLIP}.embeddings in its place",
            without=("pre_norm",),
        ),
    },
    "deit": {"one_head": Mutant({"one_head": True}, "output", "the value of cls_classifier in its place")},
    "llama": {
        "rope_interleaved": Mutant(INTERLEAVED, f"{LLAMA}.rotary_emb", "the channels interleaved, for halves"),
        "rope_interleaved_unseen": Mutant(INTERLEAVED, f"{LLAMA}.layers.0.self_attn.o_proj", TURNED, without=ROPE),
        "epsilon": Mutant({"epsilon": 1e-6}, f"{LLAMA}.layers.0.input_layernorm", "epsilon 1e-06 for 1e-05"),
        "scaled_by_width": Mutant(
            {"scaled_by_width": True},
            f"{LLAMA}.layers.0.self_attn.o_proj",
            "the scores of attention multiplied by 0.408248, which is 1 / sqrt(6)",
        ),
        "kv_heads_tiled": Mutant(
            {"tiled": True},
            f"{LLAMA}.layers.0.self_attn.o_proj",
            "query head n gets head n % 3 of keys and values, not n // 2",
        ),
    },
}
