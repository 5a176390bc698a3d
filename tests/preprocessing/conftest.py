"""Generated pictures, a model with preprocessing for them, and the reference's image processor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vit_ref.model.config import ViTConfig


def _picture(height: int, width: int, seed: int = 0) -> NDArray:
    """Returns (height, width, 4), uint8: ramps, an edge and grain, with different channels and all of 0 to 255."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    smooth = np.stack([x, 1 - y, (x + y > 0.9).astype(float), np.sqrt(x * y)], axis=-1)
    grain = rng.normal(scale=0.3, size=smooth.shape)
    return np.clip(255 * (smooth + grain), 0, 255).round().astype(np.uint8)


def _asks_for(preprocessor: Mapping[str, Any] | None, image_hw: tuple[int, int] = (10, 14)) -> ViTConfig:
    return ViTConfig(image_size=image_hw, patch_size=1, preprocessor=preprocessor)


def _by_reference(
    images: Sequence[Image.Image], settings: Mapping[str, Any], processor: str = "ViTImageProcessor", **options: Any
) -> NDArray:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Palette images with Transparency expressed in bytes")
        made = getattr(transformers, processor)(**{"do_convert_rgb": True, **settings})
        return made(list(images), return_tensors="np", **options)["pixel_values"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="session")
def picture() -> Callable[..., NDArray]:
    """`picture(height, width, seed=0)`: an array with red, green, blue and alpha."""
    return _picture


@pytest.fixture(scope="session")
def asks_for() -> Callable[..., ViTConfig]:
    """`asks_for(preprocessor, image_hw=(10, 14))`: the configuration of a model with that preprocessor file."""
    return _asks_for


@pytest.fixture(scope="session")
def by_reference() -> Callable[..., NDArray]:
    """`by_reference(images, settings, processor="ViTImageProcessor", **options)`: its result, as NHWC."""
    return _by_reference
