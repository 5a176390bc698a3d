"""This package's own model as the port under test."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.model import Tap
from vit_ref.porting import detect, port
from vit_ref.pretrained import filled, parameters_of_state, skeleton
from vit_ref.verify.tapped import Forward, Tapped


class OwnCandidate(Tapped):
    """`vit_ref.VisionTransformer`, filled from a checkpoint by `vit_ref`'s own weight map.

    Args:
      config: the model's configuration.
      source: the checkpoint.
    """

    name = "vit_ref"

    def __init__(self, config: ViTConfig, source: Checkpoint):
        self.config = config
        self.parameters = port(source.tensors, config, detect(source.tensors))
        self._skeletons: dict[np.dtype, tuple[nnx.GraphDef, nnx.State]] = {}

    def ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        """See `Tapped.ready`."""
        narrow = np.dtype(dtype) != np.float64
        parameters = {
            path: value.astype(np.float32) if narrow and value.dtype == np.float64 else value
            for path, value in self.parameters.items()
        }
        if np.dtype(dtype) not in self._skeletons:
            self._skeletons[np.dtype(dtype)] = skeleton(self.config, dtype)
        graph, shapes = self._skeletons[np.dtype(dtype)]

        def forward(state: nnx.State, pixels: jax.Array, tap: Tap) -> jax.Array:
            return nnx.merge(graph, state)(pixels, tap=tap)

        return filled(shapes, parameters), forward

    def by_path(self, gradients: nnx.State) -> dict[str, NDArray]:
        """See `Tapped.by_path`."""
        return parameters_of_state(gradients)
