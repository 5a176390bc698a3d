"""Does a run show the sites, shapes and dtypes that `sites` predicts without running anything?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.precisions import precision_of
from tests.helpers.vit_strategies import configs, times
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import Site, sites
from vit_ref.model.vit import VisionTransformer

batches = st.integers(1, 4)
dtypes = st.sampled_from(("float32", "bfloat16", "float16", "float64"))
grids = st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4))


class Shown(NamedTuple):
    """The sites of a forward pass in order, each with its dtype, and its output."""

    sites: list[tuple[Site, np.dtype]]
    output: tuple[tuple[int, ...], np.dtype]


def image_of(config: ViTConfig, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Returns (height, width) of an image of `grid` patches, by default the native size."""
    rows, columns = grid or config.grid()
    return rows * config.patch_hw[0], columns * config.patch_hw[1]


def foretell(config: ViTConfig, batch: int, image_hw: tuple[int, int], dtype: str) -> Shown:
    listed = [(site, site.dtype(dtype)) for site in sites(config, batch, image_hw)]
    last, last_dtype = listed[-1]
    return Shown(listed, (last.shape, last_dtype))


def show(model: VisionTransformer, pixels: jax.Array) -> Shown:
    seen: list[tuple[Site, np.dtype]] = []

    def tap(site: str, value: jax.Array) -> jax.Array:
        seen.append((Site(site, value.shape), value.dtype))
        return value

    output = model(pixels, tap=tap, interpolate_pos_encoding=True)
    return Shown(seen, (output.shape, output.dtype))


@times(2)
@given(config=configs(max_blocks=3), batch=batches, dtype=dtypes, grid=grids)
def test_an_abstract_run_shows_what_is_foretold(
    config: ViTConfig, batch: int, dtype: str, grid: tuple[int, int] | None
) -> None:
    image_hw = image_of(config, grid)
    pixels = jax.ShapeDtypeStruct((batch, *image_hw, config.num_channels), np.float32)
    shown: list[Shown] = []

    def forward(pixels: jax.Array) -> jax.Array:
        model = VisionTransformer(config, dtype=dtype, rngs=nnx.Rngs(0))
        shown.append(show(model, pixels))
        # Without a tap attention takes the fused path.
        return model(pixels, interpolate_pos_encoding=True)

    with precision_of(dtype).active():
        untapped = jax.eval_shape(forward, pixels)
    foretold = foretell(config, batch, image_hw, dtype)
    assert shown == [foretold]
    assert (untapped.shape, untapped.dtype) == foretold.output


@given(config=configs(max_blocks=1), batch=batches, dtype=dtypes, grid=grids)
def test_a_real_run_shows_what_is_foretold(
    filled: Callable[..., VisionTransformer],
    config: ViTConfig,
    batch: int,
    dtype: str,
    grid: tuple[int, int] | None,
) -> None:
    # Not under jit, where every value is abstract again.
    with precision_of(dtype).active():
        pixels = jnp.ones((batch, *image_of(config, grid), config.num_channels), np.float32)
        shown = show(filled(config, dtype=dtype), pixels)
    assert shown == foretell(config, batch, image_of(config, grid), dtype)
