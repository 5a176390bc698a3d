"""Images for a given checkpoint: photographs, preprocessed as it asks, or synthetic ones."""

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
    """`count` images for a given checkpoint: photographs from below `images`, or synthetic ones where that is None.

    Of fewer photographs fewer; but one alone is joined by its mirror image, because a port that mixes images is right
    on one.

    Raises:
      InputError: see `find` and `load`.
    """
    if images is None:
        return synthetic_images(config, count)
    pixels = load(find(Path(images), count), config)
    return np.concatenate([pixels, pixels[:, :, ::-1]]) if len(pixels) == 1 < count else pixels


def find(directory: Path, count: int) -> list[Path]:
    """`count` image files below `directory`, spread evenly over the sorted list so that they come from many classes.

    Raises:
      InputError: no such directory, or no image in it.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory of images")
    files, others = image_files.find(directory)
    if not files:
        raise InputError(f"{directory}: no image in it, but {image_files.counted(others)}: give one with photographs")
    return [files[k] for k in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]


def load(files: list[Path], config: ViTConfig) -> NDArray:
    """Photographs preprocessed as the checkpoint's own preprocessing config asks.

    Args:
      files: image files.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Returns:
      (len(files), height, width, 3), float32.

    Raises:
      InputError: see `preprocessing.preprocess`; or what comes out does not fit the model.
    """
    if config.num_channels != 3:
        raise InputError(f"photographs have 3 channels, the model takes {config.num_channels}: leave --images away")
    pixels = preprocess(files, config)
    if pixels.shape[1:3] != config.image_hw:
        raise InputError(
            f"photographs come out of the checkpoint's preprocessing with {list(pixels.shape[1:3])} pixels, the model"
            f" takes {list(config.image_hw)}: leave --images away"
        )
    return pixels
