"""What a classifier says of photographs."""

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

# (name of the class, its probability or value), see `predict_each`.
Prediction = list[tuple[str, float]]


def predict(
    model: VisionTransformer,
    files: Sequence[str | os.PathLike[str] | Image.Image],
    top: int = 5,
    *,
    batch_size: int = 8,
) -> list[Prediction]:
    """The likeliest classes of each image; see `predict_each`."""
    return list(predict_each(model, files, top, batch_size=batch_size))


def predict_each(
    model: VisionTransformer,
    files: Sequence[str | os.PathLike[str] | Image.Image],
    top: int = 5,
    *,
    batch_size: int = 8,
) -> Iterator[Prediction]:
    """The likeliest classes of each image, as they are found.

    Args:
      model: a model with a head. It predicts in evaluation mode, whichever mode it is in, and is left as it is.
      files: image files, or Pillow's images; preprocessed as the checkpoint asks.
      top: how many classes for each; fewer where the model has fewer. A regression gives all its values.
      batch_size: images per forward pass at the most. The last of several batches is filled up, so that one is compiled
        and no more.

    Yields:
      (name, number) of classes, by image. Names are `config.class_names`. The numbers are probabilities, the likeliest
      first, or the values of a regression in the order of its labels: `probabilities.name_unit` says which.

    Raises:
      ConfigError: `problem_type` is unknown.
      InputError: the model has no head, an image cannot be read or does not fit the model, a logit is not finite, or
        `top` or `batch_size` is below 1.
    """
    config = model.config
    if not config.num_labels:
        raise InputError("the model has no head, so it knows no classes: fine-tune it, or give another checkpoint")
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
                f"images come out of the checkpoint's preprocessing with {list(pixels.shape[1:3])} pixels, the model"
                f" takes {list(config.image_hw)}: correct preprocessor_config.json"
            )
        pixels = np.pad(pixels, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        logits = np.asarray(compute_logits(graph, state, jnp.asarray(pixels))).astype(np.float64)[: len(batch)]
        for file, row in zip(batch, logits, strict=True):
            if not np.isfinite(row).all():
                raise InputError(f"{file}: the model's logits are not all finite: its weights are damaged")
            found = compute_scores(row, config)
            # By logit, because far from zero several probabilities round to one.
            shown = np.argsort(-row, kind="stable")[:top] if ranked else range(len(row))
            yield [(config.class_names[i], float(found[i])) for i in shown]


@jax.jit(static_argnums=0)
def compute_logits(graph: nnx.GraphDef, state: nnx.State, pixels: Array) -> Array:
    """Logits (B, classes) of a split model in evaluation mode, whichever mode it was split in; compiled."""
    model = nnx.merge(graph, state)
    model.eval()
    return model(pixels)
