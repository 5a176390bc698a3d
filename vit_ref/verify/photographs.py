"""Photographs as a model sees them: read, turned upright, and preprocessed as the checkpoint asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.errors import InputError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def find(directory: Path, count: int) -> list[Path]:
    """`count` image files below `directory`, spread evenly over the sorted list so that they come from many classes.

    Raises:
      InputError: no such directory, or no image in it.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory of images")
    files = sorted(file for file in directory.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(f"{directory}: no image in it ({', '.join(sorted(_SUFFIXES))})")
    return [files[k] for k in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]


def load(files: list[Path], config: ViTConfig) -> NDArray:
    """Images preprocessed by transformers' `ViTImageProcessor` under the checkpoint's own preprocessing config.

    Args:
      files: image files.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Returns:
      (len(files), height, width, 3), float32.

    Raises:
      InputError: a file is no readable image, or the model does not take colour images.
    """
    from PIL import Image, ImageOps
    from transformers import ViTImageProcessor

    if config.num_channels != 3:
        raise InputError(f"photographs have 3 channels, the model takes {config.num_channels}: leave --images away")
    height, width = config.image_hw
    settings = {"size": {"height": height, "width": width}, **(config.preprocessor or {})}
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        except OSError as error:
            raise InputError(f"{file}: not a readable image ({error})") from None
    pixels = ViTImageProcessor(**settings)(images, return_tensors="np")["pixel_values"]
    if pixels.shape[2:] != (height, width):
        raise InputError(f"preprocessing makes images of {pixels.shape[2:]} pixels, the model takes {(height, width)}")
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1), dtype=np.float32)
