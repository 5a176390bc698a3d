"""Bugs in the cls token and the position embeddings, at the native size and resized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from numpy.typing import NDArray

from tests.mutants.injection import Inject, at, instead, loaded
from tests.mutants.mutant import Mutant
from vit_ref.model import vit
from vit_ref.model.config import ViTConfig

# PyTorch's result for a small grid, number by number. No checkpoint takes part, so there are no sites.
RESIZED = ("tests/model/test_positions.py", "-k", "resized_positions_are_pytorchs")


def _resized_by(resize: Any) -> Inject:
    return lambda monkeypatch: instead(monkeypatch, vit, "jax.image.resize", resize)


def _with(**wrong: Any) -> Inject:
    def resize(x: Array, shape: tuple[int, ...], method: Any, **options: Any) -> Array:
        return jax.image.resize(x, shape, **{"method": method, **options, **wrong})

    return _resized_by(resize)


def _by_scale_factor(x: Array, shape: tuple[int, ...], method: Any, antialias: bool) -> Array:
    # (target + 0.1) / grid, which should keep a rounded factor from losing a row.
    scale = jnp.array([(shape[axis] + 0.1) / x.shape[axis] for axis in (1, 2)])
    return jax.image.scale_and_translate(x, shape, (1, 2), scale, jnp.zeros(2), method, antialias=antialias)


def _without_edges(x: Array, shape: tuple[int, ...], method: Any, antialias: bool) -> Array:
    # PyTorch's kernel, with a = -0.75. Weights of points outside the grid are left out, and the others are scaled up.
    for axis in (1, 2):
        size, target = x.shape[axis], shape[axis]
        d = np.abs((np.arange(target)[:, None] + 0.5) * size / target - 0.5 - np.arange(size))
        near, far = (1.25 * d - 2.25) * d**2 + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3
        weights = np.where(d <= 1, near, np.where(d < 2, far, 0))
        weights = jnp.asarray(weights / weights.sum(1, keepdims=True), x.dtype)
        x = jnp.moveaxis(jnp.tensordot(weights, x, (1, axis)), 0, axis)
    return x


def _cls_position(factor: float) -> Inject:
    def change(parameters: dict, config: ViTConfig) -> dict:
        positions = parameters["position_embeddings"].copy()
        positions[:, 0] *= factor
        return {"position_embeddings": positions}

    return loaded(change)


def _grid(change: Any) -> Inject:
    """Reads the grid of position embeddings (rows, columns, D) as `change(grid)`."""

    def read(parameters: dict, config: ViTConfig) -> dict:
        positions = parameters["position_embeddings"]
        grid: NDArray = positions[0, 1:].reshape(*config.grid(), -1)
        read = change(grid).reshape(1, -1, positions.shape[-1])
        return {"position_embeddings": np.concatenate([positions[:, :1], read], axis=1)}

    return loaded(read)


def _cls_last(parts: list[Array], axis: int) -> Array:
    return jnp.concatenate(parts[::-1], axis=axis)


def _promoted_without_positions(values: tuple, dtype: Any) -> tuple:
    *others, positions = values
    # Keeps the stored dtype through the resize. Adding to the tokens promotes the result.
    return (*promote_dtype(tuple(others), dtype=dtype), positions)


def _asked_for_columns_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    resize = vit.resize_positions
    monkeypatch.setattr(
        vit, "resize_positions", lambda x, grid, target: x if target == grid else resize(x, grid, target[::-1])
    )


MUTANTS = (
    Mutant(
        number=21,
        name="bicubic-of-another-kernel",
        story="jax's cubic: a = -0.5 and no points beyond the border; PyTorch has -0.75 and repeats the edge",
        source="jax #15768",
        inject=_with(method="cubic"),
        killed_by="model",
        tests=RESIZED,
    ),
    Mutant(
        name="bicubic-without-repeated-edges",
        story="the kernel is PyTorch's, but points beyond the border are left out, not repeated from the edge",
        source="jax.image.scale_and_translate, with any kernel but PyTorch's",
        inject=_resized_by(_without_edges),
        killed_by="model",
        tests=RESIZED,
    ),
    Mutant(
        number=22,
        name="antialiased-positions",
        story="jax.image.resize smooths where it shrinks, PyTorch does not",
        source="jax.image.resize's default",
        inject=_with(antialias=True),
        killed_by="model",
        tests=RESIZED,
    ),
    Mutant(
        number=23,
        name="bilinear-positions",
        story="bilinear for bicubic",
        source="timm #2543",
        inject=_with(method="linear"),
        killed_by="model",
        tests=RESIZED,
    ),
    Mutant(
        number=24,
        name="positions-by-scale-factor",
        story="a scale factor, with 0.1 added against rounding, instead of the target's size",
        source="dinov2 #378, HF #32410",
        inject=_resized_by(_by_scale_factor),
        killed_by="model",
        tests=RESIZED,
    ),
    Mutant(
        number=25,
        name="position-grid-transposed",
        story="rows and columns are exchanged; on square grids it still runs",
        source="dinov2 #333",
        inject=_grid(lambda grid: grid.swapaxes(0, 1)),
        first_site="embeddings",
        cause="position grid transposed",
    ),
    Mutant(
        number=26,
        name="cls-position-omitted",
        story="positions are added to the patches only, before the cls token is added",
        source="big_vision adds positions before it concatenates",
        inject=_cls_position(0),
        first_site="embeddings",
        cause="cls token without its position",
    ),
    Mutant(
        name="cls-position-twice",
        story="the converter folds the position into the cls token, and the model adds it again",
        source="big_vision checkpoints have it folded in",
        inject=_cls_position(2),
        first_site="embeddings",
        cause="cls token's position added twice",
    ),
    Mutant(
        number=27,
        name="cls-token-last",
        story="the cls token comes after the patches",
        source="big_vision",
        inject=lambda monkeypatch: instead(monkeypatch, vit, "jnp.concatenate", _cls_last),
        first_site="embeddings",
        cause="cls token last",
    ),
    Mutant(
        name="no-positions",
        story="position embeddings are created but never added",
        source="PyTorch gives no message about an unused parameter",
        inject=at(
            "embeddings",
            lambda value, here: value - here.model.position_embeddings[...].astype(value.dtype),
        ),
        first_site="embeddings",
        cause="no position embedding",
    ),
    Mutant(
        name="embeddings-times-sqrt-hidden-size",
        story="embeddings are multiplied by sqrt(D), as in Transformers for text",
        source="Vaswani et al. (2017), section 3.4",
        inject=at("embeddings", lambda value, here: value * 33**0.5),
        first_site="embeddings",
        cause="5.74456 x the reference",
    ),
    Mutant(
        name="one-token-off",
        story="the last token of seventeen is off by one part in 10^9",
        source="an index of a cache or of a padded sequence",
        inject=at("block.0.norm2", lambda value, here: value.at[:, -1].multiply(1 + 1e-9)),
        first_site="block.0.norm2",
    ),
    Mutant(
        name="positions-resized-to-width-by-height",
        story="the resize is right, but it gets (columns, rows)",
        source="dinov2 #333 and #378",
        inject=_asked_for_columns_by_rows,
        killed_by="model",
        # Tested with a small grid by hand and not by parity, whose images have the native size.
        tests=("tests/model/test_positions.py", "-k", "another_size_adds"),
    ),
    Mutant(
        name="no-gradient-through-the-resize",
        story="resized positions are constants, so they do not train at a size other than the checkpoint's",
        source="a resize done on load, or in NumPy",
        inject=_resized_by(lambda *sizes, **options: jax.lax.stop_gradient(jax.image.resize(*sizes, **options))),
        killed_by="model",
        # One function and its derivative are tested, so there is no site.
        tests=("tests/model/test_positions.py", "-k", "gradient"),
    ),
    Mutant(
        name="positions-resized-as-stored",
        story="positions are resized in bfloat16, in which they are stored",
        source="an earlier state of this model",
        inject=lambda monkeypatch: monkeypatch.setattr(vit, "promote_dtype", _promoted_without_positions),
        killed_by="model",
        # The test compares one value of one function.
        tests=("tests/model/test_positions.py", "-k", "resized_in_the_dtype"),
    ),
)
