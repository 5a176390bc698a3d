"""Fixtures that several folders of tests use."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.model.skeleton import list_parameters, skeleton
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.compare.trace import Trace
from vit_ref.weights import pretrained
from vit_ref.weights.mapping import Tensors


def _filled(config: ViTConfig, dtype: DTypeLike | None = None) -> VisionTransformer:
    rng = np.random.default_rng(0)
    shapes = list_parameters(config).items()
    return pretrained.build(
        config, {path: rng.normal(size=shape).astype(np.float32) / 4 for path, shape in shapes}, dtype=dtype
    )


@pytest.fixture(scope="session")
def filled() -> Callable[..., VisionTransformer]:
    """`filled(config, dtype=None)`: a model of that configuration with no parameter at its initial value."""
    return _filled


# Compiled once for each configuration and batch size, whatever the weights.
@partial(jax.jit, static_argnums=0)
def _observe(graph: nnx.GraphDef, state: nnx.State, pixels: jax.Array) -> dict[str, jax.Array]:
    recorded: dict[str, jax.Array] = {}

    def tap(site: str, value: jax.Array) -> jax.Array:
        recorded[site] = value
        return value

    nnx.merge(graph, state)(pixels, tap=tap)
    return recorded


_skeleton = lru_cache(partial(skeleton, dtype=np.float64))


def _traced(config: ViTConfig, parameters: Tensors, pixels: NDArray) -> Trace:
    with precision_of(np.float64).active():
        graph, shapes = _skeleton(config)
        recorded = jax.device_get(
            _observe(graph, pretrained.replace_arrays(shapes, parameters), jnp.asarray(pixels, np.float64))
        )
    # jit returns the entries of a dictionary in alphabetical order.
    return {site.name: recorded[site.name] for site in sites(config, len(pixels))}


@pytest.fixture(scope="session")
def traced() -> Callable[..., Trace]:
    """`traced(config, parameters, pixels)`: the trace of this package's model in float64, in the order of its sites."""
    return _traced
