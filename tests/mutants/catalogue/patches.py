"""Bugs in the patch embedding, and in the layout of images."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from tests.mutants.injection import Pass, at, fed, layers, loaded
from tests.mutants.mutant import Mutant
from vit_ref.model.config import ViTConfig


def _mixed(parameters: dict, config: ViTConfig) -> dict:
    height, width, channels, size = parameters["patch.kernel"].shape
    as_in_pytorch = parameters["patch.kernel"].transpose(3, 2, 0, 1)
    return {"patch.kernel": as_in_pytorch.reshape(size, height, width, channels).transpose(1, 2, 3, 0)}


def _by_columns(value: Array, here: Pass) -> Array:
    rows, columns = here.model.config.grid()
    return value.reshape(len(value), rows, columns, -1).swapaxes(1, 2).reshape(value.shape)


def _by_columns_if_wide(value: Array, here: Pass) -> Array:
    rows, columns = here.model.config.grid()
    return value.reshape(len(value), columns, rows, -1).swapaxes(1, 2).reshape(value.shape)


def _padded(pixels: Array) -> Array:
    """Pads as a convolution with stride 5, kernel 5 and padding "SAME" does."""
    missing = [(-side % 5) * (pixels.ndim == 4) for side in pixels.shape[1:3]]
    return jnp.pad(
        pixels, [(0, 0), *((each // 2, each - each // 2) for each in missing), *[(0, 0)] * (pixels.ndim - 3)]
    )


def _last_image(monkeypatch: pytest.MonkeyPatch, dose: float) -> None:
    at("patches", lambda value, here: value.at[-1].multiply(1 + dose))(monkeypatch)


MUTANTS = (
    Mutant(
        number=17,
        name="patch-kernel-height-and-width-swapped",
        story="PyTorch's (out, in, height, width) is transposed to (width, height, in, out)",
        source="HF #11883; .T does it",
        inject=loaded(lambda parameters, config: {"patch.kernel": parameters["patch.kernel"].swapaxes(0, 1)}),
        first_site="patches",
        cause="patch kernel's height and width exchanged",
    ),
    Mutant(
        number=18,
        name="patch-flatten-mixes-channels-and-pixels",
        story="patches are flattened channel last, the kernel is flattened channel first",
        source="pytorch-vit #7",
        inject=loaded(_mixed),
        first_site="patches",
        cause="patch kernel's channels mixed with its pixels",
    ),
    Mutant(
        number=19,
        name="nchw-read-as-nhwc",
        story="channels-first memory under a channels-last shape",
        source="HF #11951",
        inject=fed(lambda pixels: pixels.transpose(0, 3, 1, 2).reshape(pixels.shape)),
        first_site="patches",
        cause="images read as NCHW",
    ),
    Mutant(
        number=20,
        name="same-padding",
        story="nnx.Conv's default pads images whose size is not a multiple of the patch, and the model accepts them",
        source="nnx.Conv's default",
        inject=fed(_padded),
        killed_by="model",
        # "SAME" pads nothing for sizes that fit. Only the refusal of other sizes shows the bug, before the first site.
        tests=("tests/model/test_model.py", "-k", "do_not_fit or no_multiple"),
    ),
    Mutant(
        name="same-padding-behind-the-check",
        story="nnx.Conv's default, but sizes are checked first",
        source="nnx.Conv's default",
        inject=layers("Conv", lambda *sizes, **options: nnx.Conv(*sizes, **{**options, "padding": "SAME"})),
        equivalent="with stride = kernel = p an image of n p pixels is padded by max((n - 1) p + p - n p, 0) = 0, and"
        " the model refuses all other sizes",
    ),
    Mutant(
        name="patches-column-by-column",
        story="tokens run down the columns of the grid",
        source="einops patterns with (w h) for (h w)",
        inject=at("patches", _by_columns),
        first_site="patches",
        cause="patches column by column",
    ),
    Mutant(
        name="only-for-rectangular-images",
        story="the grid's two sides are exchanged: square images, as in every demo, come out right",
        source="dinov2 #333 is one",
        inject=at("patches", _by_columns_if_wide),
        first_site="patches",
        cause="patches column by column",
    ),
    Mutant(
        name="patch-bias-dropped",
        story="the patch convolution has no bias, as in CLIP",
        source="a patch embedding reused from CLIP or a BatchNorm network",
        inject=loaded(lambda parameters, config: {"patch.bias": np.zeros_like(parameters["patch.bias"])}),
        first_site="patches",
        cause="bias left out",
    ),
    Mutant(
        name="one-image-of-the-batch-off",
        story="the last image of a batch passes through another path",
        source="padded batches and remainders take another path",
        inject=_last_image,
        doses=(1e-2, 1e-9),
        first_site="patches",
        cause=("1.01 x the reference", None),
    ),
    Mutant(
        name="channels-reversed",
        story="the channels are blue, green, red",
        source="OpenCV reads images in this order",
        inject=fed(lambda pixels: pixels[..., ::-1]),
        first_site="patches",
        cause="channels in reverse order",
    ),
    Mutant(
        name="an-image-knows-its-neighbours",
        story="activations are scaled by a maximum over the whole batch and scaled back inexactly",
        source="dynamic quantisation takes its range over the batch",
        inject=at("embeddings", lambda value, here: value * (1 + 1e-6 * jnp.tanh(jnp.abs(value).max()))),
        killed_by="properties",
        # The property compares a model with itself and prints the sites of both runs, with the first one among them.
        tests=("tests/properties/test_relations.py", "-k", "neighbours"),
        first_site="embeddings",
        says="'{site}'",
    ),
)
