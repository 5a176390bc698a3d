"""Prepares images for a checkpoint: photographs preprocessed as the checkpoint says, or synthetic images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vit_ref import image_files
from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import preprocess
from vit_ref.verify.cases import synthetic_images


def pixels_for(config: ViTConfig, images: str | os.PathLike[str] | None, count: int) -> NDArray:
    """Returns `count` images for a checkpoint, or fewer if there are fewer photographs.

    A single photograph is joined by its mirror image, because a candidate that mixes images is right on one image.

    Args:
      config: the model's configuration.
      images: a directory of photographs; None for synthetic images.
      count: the number of images.

    Returns:
      (count, height, width, C), float32.

    Raises:
      InputError: see `find` and `load`.
    """
    if images is None:
        return synthetic_images(config, count)
    pixels = load(find(Path(images), count), config)
    return np.concatenate([pixels, pixels[:, :, ::-1]]) if len(pixels) == 1 < count else pixels


def find(directory: Path, count: int) -> list[Path]:
    """Returns `count` image files below `directory`, evenly spread over the sorted list.

    Files of one class often lie together, so an even spread finds many classes.

    Args:
      directory: a directory with photographs at any depth.
      count: the number of files.

    Raises:
      InputError: the directory does not exist or has no image in it.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: this directory of images does not exist: give one that does")
    files, others = image_files.find(directory)
    if not files:
        raise InputError(
            f"{directory}: it holds no image, but {image_files.counted(others)}: give a directory with photographs"
        )
    return [files[k] for k in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]


def load(files: list[Path], config: ViTConfig) -> NDArray:
    """Loads photographs, preprocessed as the checkpoint's own preprocessing configuration says.

    Args:
      files: image files.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Returns:
      (len(files), height, width, 3), float32.

    Raises:
      InputError: see `preprocessing.preprocess`; or the images do not fit the model.
    """
    if config.num_channels != 3:
        raise InputError(f"photographs have 3 channels, but the model takes {config.num_channels}: omit --images")
    pixels = preprocess(files, config)
    if pixels.shape[1:3] != config.image_hw:
        raise InputError(
            f"the checkpoint's preprocessing gives photographs of {list(pixels.shape[1:3])} pixels, but the model takes"
            f" {list(config.image_hw)}: omit --images"
        )
    return pixels
