"""The port under test: this package's own model, observed through its taps."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.porting import detect, port
from vit_ref.pretrained import build
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
            model = build(self.config, self.parameters, dtype=dtype)
            graph, state = nnx.split(model)

            def run(state: nnx.State, pixels: jax.Array, replace: dict[str, jax.Array]) -> dict[str, jax.Array]:
                recorded: dict[str, jax.Array] = {}

                def tap(site: str, value: jax.Array) -> jax.Array:
                    recorded[site] = value
                    return replace.get(site, value)

                nnx.merge(graph, state)(pixels, tap=tap)
                return recorded

            given = {site: jnp.asarray(value, dtype) for site, value in (replace or {}).items()}
            return jax.device_get(jax.jit(run)(state, jnp.asarray(pixels, dtype), given))
