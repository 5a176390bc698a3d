"""timm's `config.json`: read as a `ViTConfig`, and written from one.

The file names an architecture and the values that deviate from it. This module reads the plain ViTs, with and without
DeiT's training, in the sizes of `ViTConfig.variant`. Its widths, depths and numbers of heads are also timm's
(timm/models/vision_transformer.py and deit.py). It concludes nothing from the weights, so a missing block is found.
timm's LayerNorm has epsilon 1e-6, and its activation is erf GELU; only the activation can be changed in the file.

Mean, std, interpolation and input size of `pretrained_cfg` become the preprocessing. timm's `crop_pct` and `crop_mode`
do not. timm resizes the shorter side to more than the model takes, and cuts out the middle. This package resizes the
whole image, as transformers does with the checkpoints that it converted from timm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vit_ref.errors import ConfigError
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import steps

_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
_NAME = re.compile(
    rf"(?:vit|deit)_({'|'.join(_SIZES)})_patch([1-9]\d*)_([1-9]\d*)(_in21k|_dino|_sam|_miil|_miil_in21k)?"
)
# The architectures that `to_timm` chooses from. It does not take the size of the images from the name.
_WRITTEN = (
    *("vit_base_patch16_224", "vit_base_patch32_224", "vit_base_patch8_224", "vit_tiny_patch16_224"),
    *("vit_small_patch16_224", "vit_small_patch32_224", "vit_small_patch8_224"),
    *("vit_large_patch16_224", "vit_large_patch32_224", "vit_large_patch14_224", "vit_huge_patch14_224"),
)

# timm's names (timm/layers/create_act.py) -> this package's. The first is the one to read as.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
    "quick_gelu": ("quick_gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
    "swish": ("swish",),
    "tanh": ("tanh",),
}
# In the order of Pillow's numbers.
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Kinds of `model_args`: those that become fields, those that do not change evaluation at the native size, and those
# that
# must have a given value. Any other argument of timm's VisionTransformer is refused.
_FIELDS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "img_size": "image_size",
    "in_chans": "num_channels",
    "qkv_bias": "qkv_bias",
    "num_classes": "num_labels",
}
_NEUTRAL = frozenset(
    {
        *(f"{what}_rate" for what in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path")),
        *("weight_init", "fix_init", "dynamic_img_size", "strict_img_size"),
    }
)
_PLAIN: dict[str, Any] = {
    "class_token": True,
    "global_pool": "token",
    "no_embed_class": False,
    "reg_tokens": 0,
    "pre_norm": False,
    "final_norm": True,
    "qk_norm": False,
    "init_values": None,
}


def is_timm(content: Mapping[str, Any]) -> bool:
    """Tells whether a `config.json` is timm's: it has an architecture and no model type."""
    return "architecture" in content and "model_type" not in content


def from_timm(content: Mapping[str, Any]) -> ViTConfig:
    """Reads the configuration from timm's `config.json`.

    Args:
      content: the parsed JSON object.

    Raises:
      ConfigError: the architecture is unknown, this model cannot compute it, or a value is not supported.
    """
    # An older form has everything in one object (timm/models/_hub.py, `_parse_model_cfg`).
    pretrained = _mapping(content.get("pretrained_cfg", content), "pretrained_cfg")
    arguments = dict(_mapping(content.get("model_args", {}), "model_args"))
    config = _architecture(content["architecture"])
    pool = content.get("global_pool", "token")
    if pool != "token":
        raise ConfigError(f"global_pool is {pool!r}: give a model with 'token', whose head reads the cls token")
    channels, *side = _input_size(pretrained.get("input_size", (3, *config.image_hw)))
    fields: dict[str, Any] = {
        **{field: getattr(config, field) for field in _FIELDS.values()},
        "num_channels": channels,
        "image_size": side,
        "num_labels": content.get("num_classes", pretrained.get("num_classes", 1000)),
        **{_FIELDS[name]: value for name, value in arguments.items() if name in _FIELDS},
    }
    for name, value in arguments.items():
        if name not in {*_FIELDS, *_NEUTRAL, *_PLAIN, "mlp_ratio", "act_layer"} or value != _PLAIN.get(name, value):
            raise ConfigError(f"model_args: {name} is {value!r}, which this model does not support: give another model")
    ratio, activation = arguments.get("mlp_ratio", 4.0), arguments.get("act_layer", "gelu")
    width = fields["hidden_size"]
    if not isinstance(width, int) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1000:
        raise ConfigError(f"model_args: embed_dim is {width!r} and mlp_ratio {ratio!r}: give positive numbers")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ConfigError(f"model_args: act_layer is {activation!r}: give one of {', '.join(_ACTIVATIONS)}")
    names = content.get("label_names")
    config = ViTConfig(
        **fields,
        intermediate_size=int(width * ratio),
        hidden_act=_ACTIVATIONS[activation][0],
        layer_norm_eps=1e-6,
        labels=tuple(map(str, names)) if isinstance(names, list) else (),
    )
    return dataclasses.replace(config, preprocessor=_preprocessor(pretrained, config))


def to_timm(config: ViTConfig) -> dict[str, Any]:
    """Returns the `config.json` with which timm builds this model, except for its epsilon.

    `from_timm` finds out what timm's file cannot store. `model_args` has the values that deviate from the named
    architecture. timm before 1.0 does not read it.
    """
    name, arguments = min(((name, _deviations(config, name)) for name in _WRITTEN), key=lambda pair: len(pair[1]))
    pretrained: dict[str, Any] = {
        "num_classes": config.num_labels,
        "input_size": [config.num_channels, *config.image_hw],
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    try:
        done = steps(config)
    except ConfigError:
        done = None
    if done and done.mean_and_std and done.resample in range(len(_INTERPOLATIONS)):
        mean, std = done.mean_and_std
        # "squash" resizes the whole image. With crop_pct below one it resizes to more, and then crops
        # (timm/data/transforms_factory.py).
        part = done.crop[0] / done.size[0] if done.crop and done.size else 1.0
        pretrained |= {"mean": mean, "std": std, "crop_pct": part, "crop_mode": "squash"}
        pretrained["interpolation"] = _INTERPOLATIONS[int(done.resample)]
    return {
        "architecture": name,
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": "token",
        **({"label_names": list(config.labels)} if config.labels else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": pretrained,
    }


def _architecture(name: Any) -> ViTConfig:
    match = _NAME.fullmatch(str(name).partition(".")[0])
    if not match:
        raise ConfigError(
            f"architecture is {name!r}: give one of timm's plain ViTs, vit_ or deit_ tiny, small, base, large or huge,"
            " such as vit_base_patch16_224; this model has no registers, no LayerScale, no other pooling and no second"
            " class token"
        )
    size, patch, side, kind = match.groups()
    return ViTConfig.variant(
        f"{_SIZES[size]}/{patch}",
        image_size=int(patch) * (int(side) // int(patch)),
        # Alibaba's models have no such biases (timm/models/vision_transformer.py).
        qkv_bias="miil" not in (kind or ""),
    )


def _deviations(config: ViTConfig, name: str) -> dict[str, Any]:
    """Returns the `model_args` that turn an architecture into `config`."""
    base = _architecture(name)
    arguments: dict[str, Any] = {
        argument: getattr(config, field)
        for argument, field in _FIELDS.items()
        # pretrained_cfg holds these three (timm/models/_builder.py).
        if argument not in ("img_size", "in_chans", "num_classes") and getattr(config, field) != getattr(base, field)
    }
    if "patch_size" in arguments and config.patch_hw[0] == config.patch_hw[1]:
        arguments["patch_size"] = config.patch_hw[0]
    if config.intermediate_size != 4 * config.hidden_size:
        # timm computes int(width * ratio). A rounded quotient may give one less, so add half a unit.
        arguments["mlp_ratio"] = (config.intermediate_size + 0.5) / config.hidden_size
    if config.hidden_act != "gelu":
        arguments["act_layer"] = next(theirs for theirs, ours in _ACTIVATIONS.items() if config.hidden_act in ours)
    return arguments


def _preprocessor(pretrained: Mapping[str, Any], config: ViTConfig) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a `pretrained_cfg`. Its defaults are those of timm/data/config.py."""
    interpolation = pretrained.get("interpolation", "bicubic")
    if interpolation not in _INTERPOLATIONS:
        raise ConfigError(
            f"pretrained_cfg: interpolation is {interpolation!r}: give one of {', '.join(_INTERPOLATIONS)}"
        )
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), config.image_hw, strict=True)),
        "resample": _INTERPOLATIONS.index(interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pretrained.get("mean", [0.485, 0.456, 0.406]),
        "image_std": pretrained.get("std", [0.229, 0.224, 0.225]),
    }


def _input_size(value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(side, int) for side in value):
        raise ConfigError(f"pretrained_cfg: input_size is {value!r}: give channels, height and width")
    return list(value)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}: give a JSON object")
    return value
