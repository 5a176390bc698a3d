"""Fixtures that more than one folder of tests needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from jax.typing import DTypeLike

from vit_ref.config import ViTConfig
from vit_ref.model import VisionTransformer
from vit_ref.porting import parameter_shapes
from vit_ref.pretrained import build


def _filled(config: ViTConfig, dtype: DTypeLike | None = None) -> VisionTransformer:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    return build(config, {path: rng.normal(size=shape).astype(np.float32) / 4 for path, shape in shapes}, dtype=dtype)


@pytest.fixture(scope="session")
def filled() -> Callable[..., VisionTransformer]:
    """`filled(config, dtype=None)`: a model of that configuration with no parameter at its initial value."""
    return _filled
