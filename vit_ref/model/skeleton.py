"""A model without values: what there is to say of one before a checkpoint is read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from vit_ref.model.attention import Attend
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer


class _OneKey:
    """In place of `nnx.Rngs` where nothing is drawn: that one counts its draws, two thirds of a model's tracing."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> Array:
        return self._key


def skeleton(
    config: ViTConfig, dtype: DTypeLike | None = None, attention: Attend | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's graph, and its parameters' shapes and dtypes; none is allocated. It takes a third of a second."""
    rngs: Any = _OneKey()
    return nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, dtype=dtype, attention=attention, rngs=rngs)))


@lru_cache(maxsize=64)
def list_parameters(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's path and shape, in the model's order, found without allocating any."""
    _, shapes = skeleton(config)
    return {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(shapes)}
