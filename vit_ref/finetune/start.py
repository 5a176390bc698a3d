"""The starting model of fine-tuning: a checkpoint with a head for the data's classes, or a small new model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_ref.errors import InputError
from vit_ref.finetune.probabilities import require_exclusive
from vit_ref.finetune.recipe import Recipe
from vit_ref.model.attention import cudnn, require_cudnn, require_heads
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer, resize_positions
from vit_ref.preprocessing import explicit, for_size
from vit_ref.weights import checkpoint
from vit_ref.weights.pretrained import build, load

# The fields of config.json that describe the head and its task, in transformers and on timm's hub pages. The labels
# themselves are written anew from `ViTConfig.labels`.
_OF_THE_HEAD = frozenset(
    {
        "_num_labels",
        "finetuning_task",
        "function_to_apply",
        "id2label",
        "label2id",
        "label_descriptions",
        "label_names",
        "num_classes",
        "num_labels",
        "problem_type",
        "task_specific_params",
    }
)

# Small enough to learn the embedded images within a minute on one core, most of which a deeper one would compile.
SCRATCH = ViTConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    layer_norm_eps=1e-6,
    image_size=32,
    patch_size=8,
)


def make_starting_model(
    source: str | os.PathLike[str] | None, classes: Sequence[str], recipe: Recipe, ignore: Iterable[str] = ()
) -> VisionTransformer:
    """Returns the model that a run starts from, in evaluation mode.

    Args:
      source: a checkpoint as `vit_ref.from_pretrained` takes it; None for a new model of the size `SCRATCH`.
      classes: names of the data's classes, in the order of their labels.
      recipe: the recipe, which decides head, image size, dropout, precision and attention.
      ignore: names or patterns of tensors in the checkpoint to leave behind.

    Raises:
      InputError: the checkpoint cannot be read. Or the recipe keeps a head that has other classes or that cross-entropy
        cannot train. Or the attention does not run on this device.
    """
    dtype = jnp.bfloat16 if recipe.precision == "mixed" else None
    attention = cudnn if recipe.attention == "cudnn" else None
    if source is None:
        config = _with_preprocessing(_for_classes(_for_recipe(SCRATCH, recipe), classes))
        return VisionTransformer(config, dtype=dtype, attention=attention, rngs=nnx.Rngs(recipe.seed))
    ignore = tuple(ignore)
    was, parameters, _ = load(checkpoint.read(source, ignore=ignore), ignore=ignore)
    config = _with_preprocessing(_for_recipe(was, recipe))
    if config.image_hw != was.image_hw:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            # In bfloat16 the resize itself would round the positions.
            positions = jnp.asarray(parameters["position_embeddings"], jnp.float32)
            parameters["position_embeddings"] = np.asarray(resize_positions(positions, was.grid(), config.grid()))
    if recipe.head == "keep":
        if tuple(was.labels) != tuple(classes):
            raise InputError(
                f"{source}: its head has the classes {_few(was.labels)}, and the data has {_few(classes)}: take a fresh"
                " head (--head fresh)"
            )
        require_exclusive(was, os.fspath(source))
    else:
        config = _for_classes(config, classes)
        parameters = {path: value for path, value in parameters.items() if path.split(".")[0] not in ("head", "pooler")}
        # Zeros, as in the paper (appendix B.1.1): the first steps then push no noise through the backbone.
        parameters["head.kernel"] = np.zeros((config.hidden_size, len(classes)), np.float32)
        parameters["head.bias"] = np.zeros(len(classes), np.float32)
    # The trained parameters are float32, whatever the checkpoint's dtype: in bfloat16 small updates would be lost.
    masters = {path: value.astype(np.float32) for path, value in parameters.items()}
    return build(config, masters, dtype=dtype, attention=attention)


def _require_cudnn(config: ViTConfig) -> None:
    require_cudnn()
    require_heads(config.head_dim)
    if config.attention_probs_dropout_prob:
        raise InputError(
            f"the model's attention dropout is {config.attention_probs_dropout_prob:g}, and cuDNN's attention has none:"
            " give dropout 0, or attention 'xla'"
        )


def _for_recipe(config: ViTConfig, recipe: Recipe) -> ViTConfig:
    if recipe.dropout is not None:
        config = dataclasses.replace(
            config, hidden_dropout_prob=recipe.dropout, attention_probs_dropout_prob=recipe.dropout
        )
    if recipe.attention == "cudnn":
        _require_cudnn(config)
    if recipe.image_size is None or config.image_hw == (recipe.image_size,) * 2:
        return config
    side = recipe.image_size
    return dataclasses.replace(config, image_size=side, preprocessor=for_size(config, side, side))


def _with_preprocessing(config: ViTConfig) -> ViTConfig:
    """Returns the configuration with all its preprocessing explicit, so that later users give the model the same."""
    return dataclasses.replace(config, preprocessor=explicit(config))


def _for_classes(config: ViTConfig, classes: Sequence[str]) -> ViTConfig:
    """Returns the configuration with a new head, and without the fields of the old head or pooler."""
    return dataclasses.replace(
        config,
        num_labels=len(classes),
        labels=tuple(classes),
        pooler=False,
        pooler_output_size=None,
        pooler_act=ViTConfig.pooler_act,
        extra={name: value for name, value in config.extra.items() if name not in _OF_THE_HEAD},
    )


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''} ({len(names)})"
