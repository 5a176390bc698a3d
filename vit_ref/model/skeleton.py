"""A model without values, for what is known before a checkpoint is read."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from itertools import groupby
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from vit_ref.model.attention import Attend
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer


class _OneKey:
    """Stand-in for `nnx.Rngs` that draws nothing, because counting draws takes most of the time of tracing a model."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> Array:
        return self._key


def skeleton(
    config: ViTConfig, dtype: DTypeLike | None = None, attention: Attend | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a model's graph, and the shapes and dtypes of its parameters, without allocating any."""
    rngs: Any = _OneKey()
    return nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, dtype=dtype, attention=attention, rngs=rngs)))


@lru_cache(maxsize=64)
def list_parameters(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Lists every parameter's path and shape, in the model's order, without allocating any."""
    # One block stands for all of them. To trace twelve takes half a second.
    _, shapes = skeleton(dataclasses.replace(config, num_hidden_layers=min(1, config.num_hidden_layers)))
    flat = [(tuple(map(str, path)), variable.shape) for path, variable in nnx.to_flat_state(shapes)]
    found: dict[str, tuple[int, ...]] = {}
    for in_blocks, group in groupby(flat, lambda entry: entry[0][0] == "blocks"):
        entries = list(group)
        for i in range(config.num_hidden_layers if in_blocks else 1):
            for path, shape in entries:
                found[".".join((path[0], str(i), *path[2:]) if in_blocks else path)] = shape
    return found
