"""Do the relations between images, patches, heads and positions hold that hold for every ViT, whatever its weights?

All tests are in float64, where a broken relation is off by ten orders of magnitude more than an intact one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from tests.helpers.vit_strategies import configs, indices, random_cycle, seeds, weights
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.model.vit import VisionTransformer, resize_positions
from vit_ref.verify.cases import synthetic_images
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.gates import error

# Largest relative RMS error at a site, in units of float64 rounding. Two runs that sum in another order differ by a
# few.
# A LayerNorm multiplies that by its token's rms over its deviation, which exceeds 200 once in 10^9 tokens of at least
# five channels. A broken relation is off by 10^12.
ROUNDINGS = 2**10

wide_configs = configs(min_width=5)
batches = st.integers(2, 4)
Traced = Callable[..., Trace]


def diverging(found: Trace, expected: Trace) -> dict[str, float]:
    """Returns the sites at which two traces differ by more than rounding, with the difference in units."""
    units = {site: error(value, expected[site]).rms / np.finfo(np.float64).eps for site, value in found.items()}
    return {site: off for site, off in units.items() if not off <= ROUNDINGS}


def at(trace: Trace, images: NDArray | slice | int) -> Trace:
    """Returns the trace of some of the images."""
    return {site: value[images] for site, value in trace.items()}


def rearranged(images: NDArray, config: ViTConfig, order: NDArray) -> NDArray:
    """Returns the images with patch `order[k]` at position `k`. Patches are counted row by row."""
    (rows, columns), (height, width) = config.grid(), config.patch_hw
    cut = images.reshape(-1, rows, height, columns, width, config.num_channels).swapaxes(2, 3)
    moved = cut.reshape(-1, rows * columns, height, width, config.num_channels)[:, order]
    return moved.reshape(cut.shape).swapaxes(2, 3).reshape(images.shape)


@given(config=wide_configs, batch=batches, seed=seeds, kept=indices)
def test_an_image_does_not_depend_on_its_neighbours(
    traced: Traced, config: ViTConfig, batch: int, seed: int, kept: int
) -> None:
    parameters, images = weights(config, seed), synthetic_images(config, batch, seed)
    kept %= batch
    # A hundred times as bright, so that a statistic over the batch would change all images.
    others = 100 * synthetic_images(config, batch, seed + 1)
    others[kept] = images[kept]
    alone, beside = traced(config, parameters, images), traced(config, parameters, others)
    assert not diverging(at(beside, kept), at(alone, kept))


@given(config=wide_configs, batch=batches, seed=seeds)
def test_permuting_a_batch_permutes_everything(traced: Traced, config: ViTConfig, batch: int, seed: int) -> None:
    parameters, images = weights(config, seed), synthetic_images(config, batch, seed)
    order = random_cycle(batch, seed)
    permuted, straight = traced(config, parameters, images[order]), traced(config, parameters, images)
    assert not diverging(permuted, at(straight, order))


@given(config=wide_configs, parts=st.integers(2, 4), size=st.integers(1, 3), seed=seeds)
def test_a_batch_in_parts_equals_the_whole(traced: Traced, config: ViTConfig, parts: int, size: int, seed: int) -> None:
    parameters, images = weights(config, seed), synthetic_images(config, parts * size, seed)
    whole = traced(config, parameters, images)
    # Equal parts, because every size is compiled anew.
    traces = [traced(config, parameters, part) for part in np.split(images, parts)]
    joined = {site: np.concatenate([trace[site] for trace in traces]) for site in whole}
    assert not diverging(joined, whole)


@given(config=configs(min_width=5, min_patches=2), batch=batches, seed=seeds)
def test_patches_moved_with_their_positions_leave_the_logits(
    traced: Traced, config: ViTConfig, batch: int, seed: int
) -> None:
    parameters, images = weights(config, seed), synthetic_images(config, batch, seed)
    order = random_cycle(config.grid()[0] * config.grid()[1], seed)
    tokens = np.concatenate([[0], 1 + order])  # the cls token stays
    moved = rearranged(images, config, order)
    with_positions = {**parameters, "position_embeddings": parameters["position_embeddings"][:, tokens]}
    straight, together = traced(config, parameters, images), traced(config, with_positions, moved)
    end = sites(config, batch)[-1].name
    expected = {**straight, "norm": straight["norm"][:, tokens]}
    assert not diverging({site: together[site] for site in ("norm", end)}, expected)
    # Moved without their positions, the patches make another image.
    assert diverging({"norm": traced(config, parameters, moved)["norm"]}, expected)


@given(config=wide_configs, batch=batches, seed=seeds, block=indices, head=indices)
def test_a_head_whose_output_rows_are_zero_is_no_head(
    traced: Traced, config: ViTConfig, batch: int, seed: int, block: int, head: int
) -> None:
    block, head = block % config.num_hidden_layers, head % config.num_attention_heads
    mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
    attn = f"blocks.{block}.attn"
    unread, mute = weights(config, seed), weights(config, seed)
    unread[f"{attn}.out.kernel"][mine] = 0
    mute[f"{attn}.value.kernel"][:, mine] = 0
    if config.qkv_bias:
        mute[f"{attn}.value.bias"][mine] = 0
    images = synthetic_images(config, batch, seed)
    trace, muted = traced(config, unread, images), traced(config, mute, images)
    site = f"block.{block}.attn.out"
    expected = attention_without(head, trace[f"block.{block}.norm1"], weights(config, seed), attn, config)
    assert not diverging({site: trace[site]}, {site: expected})
    # All later values are those of a head whose own values are zero.
    names = list(trace)
    assert not diverging({site: trace[site] for site in names[names.index(site) :]}, muted)


def attention_without(head: int, x: NDArray, parameters: dict[str, NDArray], attn: str, config: ViTConfig) -> NDArray:
    """Computes Vaswani et al. (2017), section 3.2.2, over all heads but one, whose parameters are removed."""
    out = parameters[f"{attn}.out.bias"].astype(np.float64)
    for other in set(range(config.num_attention_heads)) - {head}:
        theirs = slice(other * config.head_dim, (other + 1) * config.head_dim)
        query, key, value = (
            x @ parameters[f"{attn}.{role}.kernel"][:, theirs].astype(np.float64)
            + (parameters[f"{attn}.{role}.bias"][theirs] if config.qkv_bias else 0)
            for role in ("query", "key", "value")
        )
        scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(config.head_dim))
        out = out + scores / scores.sum(-1, keepdims=True) @ value @ parameters[f"{attn}.out.kernel"][theirs]
    return np.broadcast_to(out, x.shape)


@given(config=configs())
def test_at_the_native_size_positions_are_not_resized(config: ViTConfig) -> None:
    """Compares programs: the compiler gets the same one whether other sizes are allowed or not."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    pixels = jax.ShapeDtypeStruct((1, *config.image_hw, config.num_channels), np.float32)

    def program(interpolate: bool) -> str:
        def forward(state: nnx.State, pixels: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(pixels, interpolate_pos_encoding=interpolate)

        return jax.jit(forward).lower(state, pixels).as_text()

    assert program(interpolate=True) == program(interpolate=False)


grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(grid=grids, target=grids, width=st.integers(1, 5), seed=seeds)
def test_positions_that_are_all_alike_are_so_at_any_size(
    grid: tuple[int, int], target: tuple[int, int], width: int, seed: int
) -> None:
    cls, patch = np.random.default_rng(seed).normal(size=(2, 1, 1, width))
    alike = np.concatenate([cls, np.broadcast_to(patch, (1, grid[0] * grid[1], width))], axis=1)
    with precision_of(np.float64).active():
        resized = np.asarray(resize_positions(alike, grid, target))
    np.testing.assert_array_equal(resized[:, :1], cls)
    # Sixteen products with weights that add up to one.
    bound = 16 * np.finfo(np.float64).eps
    assert resized.shape == (1, 1 + target[0] * target[1], width)
    assert (np.abs(resized[:, 1:] - patch) <= bound * np.abs(patch)).all()
