"""Predictions of a classifier for photographs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vit_ref.errors import InputError
from vit_ref.finetune.probabilities import compute_scores, name_unit
from vit_ref.model.vit import VisionTransformer
from vit_ref.preprocessing import preprocess

if TYPE_CHECKING:
    from PIL import Image

# (name of the class, its probability or value) for each class; see `predict_each`.
Prediction = list[tuple[str, float]]


def predict(
    model: VisionTransformer,
    files: Sequence[str | os.PathLike[str] | Image.Image],
    top: int = 5,
    *,
    batch_size: int = 8,
) -> list[Prediction]:
    """Returns the likeliest classes of each image.

    Args:
      model: a model with a head.
      files: image files, or Pillow's images.
      top: number of classes for each image.
      batch_size: greatest number of images in a forward pass.

    Returns:
      What `predict_each` yields.

    Raises:
      ConfigError: `problem_type` is unknown.
      InputError: the model has no head, an image cannot be used, a logit is not finite, or a number is below 1.
    """
    return list(predict_each(model, files, top, batch_size=batch_size))


def predict_each(
    model: VisionTransformer,
    files: Sequence[str | os.PathLike[str] | Image.Image],
    top: int = 5,
    *,
    batch_size: int = 8,
) -> Iterator[Prediction]:
    """Yields the likeliest classes of each image, batch by batch.

    Args:
      model: a model with a head, in either mode. The function runs it in evaluation mode and does not change it.
      files: image files, or Pillow's images. The function preprocesses them as the checkpoint says.
      top: number of classes for each image. A model with fewer classes gives all of them. A regression gives all
        values.
      batch_size: greatest number of images in a forward pass. The last batch is filled up, so that only one shape is
        compiled.

    Yields:
      (name, number) of classes, image by image. The names are `config.class_names`. The numbers are probabilities, the
      likeliest first, or the values of a regression in the order of its labels. `probabilities.name_unit` tells which.

    Raises:
      ConfigError: `problem_type` is unknown.
      InputError: the model has no head, an image cannot be used, a logit is not finite, or a number is below 1.
    """
    config = model.config
    if not config.num_labels:
        raise InputError("the model has no head, so it has no classes: fine-tune it, or give another checkpoint")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}: give at least 1")
    ranked = name_unit(config) == "probability"
    graph, state = nnx.split(model)
    batch_size = max(1, min(batch_size, len(files)))
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        pixels = preprocess(batch, config)
        if pixels.shape[1:3] != config.image_hw:
            raise InputError(
                f"preprocessing makes images of {list(pixels.shape[1:3])} pixels, and the model takes"
                f" {list(config.image_hw)}: correct preprocessor_config.json"
            )
        pixels = np.pad(pixels, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        logits = np.asarray(compute_logits(graph, state, jnp.asarray(pixels))).astype(np.float64)[: len(batch)]
        for file, row in zip(batch, logits, strict=True):
            if not np.isfinite(row).all():
                raise InputError(
                    f"{file}: the model's logits are not all finite: its weights are damaged: load them again"
                )
            scores = compute_scores(row, config)
            # Rank by logit, because far from zero several probabilities round to one.
            shown = np.argsort(-row, kind="stable")[:top] if ranked else range(len(row))
            yield [(config.class_names[i], float(scores[i])) for i in shown]


@jax.jit(static_argnums=0)
def compute_logits(graph: nnx.GraphDef, state: nnx.State, pixels: Array) -> Array:
    """Returns the logits (B, classes) of a split model in evaluation mode, whichever mode it had. It is compiled."""
    model = nnx.merge(graph, state)
    model.eval()
    return model(pixels)
