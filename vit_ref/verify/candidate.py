"""The port under test: this package's own model, observed through its taps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.porting import detect, port
from vit_ref.pretrained import build, parameters_of_state
from vit_ref.sites import sites
from vit_ref.verify.backward import Gradients, Objective, differentiator
from vit_ref.verify.trace import Trace, precision_of


class OwnCandidate:
    """`vit_ref.VisionTransformer`, filled from a checkpoint by `vit_ref`'s own weight map.

    Args:
      config: the model's configuration.
      source: the checkpoint.
    """

    name = "vit_ref"

    def __init__(self, config: ViTConfig, source: Checkpoint):
        self.config = config
        self.parameters = port(source.tensors, config, detect(source.tensors))

    def trace(self, pixels: NDArray, dtype: DTypeLike, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """See `Implementation.trace`.

        Args:
          pixels: as there.
          dtype: as there.
          replace: values by site that take the place of the model's own, after those were recorded.
        """
        with precision_of(dtype):
            narrow = np.dtype(dtype) != np.float64
            parameters = {
                path: value.astype(np.float32) if narrow and value.dtype == np.float64 else value
                for path, value in self.parameters.items()
            }
            graph, state = nnx.split(build(self.config, parameters, dtype=dtype))

            def run(state: nnx.State, pixels: jax.Array, replace: dict[str, jax.Array]) -> dict[str, jax.Array]:
                recorded: dict[str, jax.Array] = {}

                def tap(site: str, value: jax.Array) -> jax.Array:
                    recorded[site] = value
                    return replace.get(site, value)

                nnx.merge(graph, state)(pixels, tap=tap)
                return recorded

            given = {site: jnp.asarray(value, dtype) for site, value in (replace or {}).items()}
            return jax.device_get(jax.jit(run)(state, jnp.asarray(pixels, dtype), given))

    def gradients(self, pixels: NDArray, dtype: DTypeLike) -> Callable[[Objective], Gradients]:
        """See `Differentiable.gradients`."""
        with precision_of(dtype):
            wide = np.promote_types(np.dtype(dtype), np.float32)
            parameters = {path: value.astype(wide) for path, value in self.parameters.items()}
            graph, state = nnx.split(build(self.config, parameters, dtype=dtype))

        def forward(state: nnx.State, perturbations: Mapping[str, jax.Array], pixels: jax.Array) -> jax.Array:
            def tap(site: str, value: jax.Array) -> jax.Array:
                return value + perturbations[site].astype(value.dtype)

            return nnx.merge(graph, state)(pixels, tap=tap)

        shapes = sites(self.config, len(pixels), pixels.shape[1:3])
        differentiate = differentiator(forward, state, shapes, pixels, dtype)

        def gradients(objective: Objective) -> Gradients:
            by_parameter, by_site, by_pixel = differentiate(objective)
            return Gradients(by_site, parameters_of_state(by_parameter), by_pixel)

        return gradients
