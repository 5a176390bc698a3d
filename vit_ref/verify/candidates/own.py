"""This package's own model as the candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import output_site, sites
from vit_ref.model.skeleton import skeleton
from vit_ref.model.vit import identity
from vit_ref.verify.candidates.outline import Shape
from vit_ref.verify.candidates.tapped import Tapped
from vit_ref.verify.compare.trace import Forward, Tap, narrowed
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.mapping import detect, port
from vit_ref.weights.pretrained import get_state_parameters, replace_arrays


class OwnCandidate(Tapped):
    """`vit_ref.VisionTransformer`, filled from a checkpoint by `vit_ref`'s own weight map.

    Args:
      config: the model's configuration.
      source: the checkpoint.
    """

    name = "vit_ref"

    def __init__(self, config: ViTConfig, source: Checkpoint):
        self.config = config
        self.fill(source)
        self._by_dtype: dict[np.dtype, tuple[nnx.State, Forward]] = {}

    def fill(self, source: Checkpoint) -> None:
        """Takes the weights of another checkpoint. Compiled code is used again."""
        self.parameters = port(source.tensors, self.config, detect(source.tensors))

    def ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        """Implements `Tapped.ready`."""
        if np.dtype(dtype) not in self._by_dtype:
            graph, shapes = skeleton(self.config, dtype)

            def forward(state: nnx.State, pixels: jax.Array, tap: Tap | None) -> jax.Array:
                return nnx.merge(graph, state)(pixels, tap=tap or identity)

            self._by_dtype[np.dtype(dtype)] = shapes, forward
        shapes, same = self._by_dtype[np.dtype(dtype)]
        # Weights stay on the host until a pass needs them, because a real model's are large.
        return replace_arrays(shapes, narrowed(self.parameters, dtype)), same

    @property
    def last(self) -> str:
        """Implements `Runnable.last`."""
        return output_site(self.config)

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """Implements `Tapped.shapes`."""
        return {site.name: site.shape for site in sites(self.config, len(inputs), inputs.shape[1:3])}

    def by_path(self, gradients: nnx.State) -> dict[str, NDArray]:
        """Implements `Tapped.by_path`."""
        return get_state_parameters(gradients)
