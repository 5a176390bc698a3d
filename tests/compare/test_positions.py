"""Are positions that were resized in another way named, and none that were not?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.diagnose.divergence import Divergence
from vit_ref.verify.diagnose.positions import resize_otherwise

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
SIDE, GRID, WIDTH = 5, (4, 7), 6
POSITIONS = RNG.normal(size=(1, 1 + SIDE**2, WIDTH))
PATCHES = RNG.normal(size=(2, WIDTH, *GRID))
START = RNG.normal(size=(2, 3, WIDTH))


def tokens(positions: NDArray) -> NDArray:
    """Returns three tokens, and the patches with their positions."""
    return np.concatenate([START, PATCHES.reshape(2, WIDTH, -1).swapaxes(1, 2) + positions], axis=1)


def resized(mode: str = "bicubic", *, turned: bool = False, **options: Any) -> NDArray:
    """Returns the positions of the patches as PyTorch resizes them, to the grid if no factor is given."""
    square = POSITIONS[0, 1:].reshape(SIDE, SIDE, WIDTH)
    square = (square.swapaxes(0, 1) if turned else square).transpose(2, 0, 1)
    options = options if "scale_factor" in options else {"size": GRID, **options}
    made = torch.nn.functional.interpolate(torch.tensor(square.copy())[None], mode=mode, **options)
    assert made.shape[2:] == GRID
    return made[0].numpy().transpose(1, 2, 0).reshape(-1, WIDTH)


def labels(truth: NDArray, value: NDArray) -> list[str]:
    found = Divergence("embeddings", value, truth)
    before = {"patches.flat": PATCHES.reshape(2, WIDTH, -1).swapaxes(1, 2), "patches": PATCHES}
    return [cause.label for cause in found.causes(resize_otherwise(truth, before, {"other": START, "pos": POSITIONS}))]


BY_FACTOR = {"scale_factor": tuple((size + 0.1) / SIDE for size in GRID)}


@pytest.mark.parametrize(
    ("right", "wrong", "label"),
    [
        ({}, {"antialias": True}, "bicubic (-0.5), antialiased, border cut off, to the size; right is bicubic (-0.75)"),
        ({}, {"mode": "bilinear"}, "bilinear, not antialiased, border repeated, to the size; right is bicubic"),
        ({"mode": "bilinear"}, {}, "bicubic (-0.75), not antialiased, border repeated, to the size; right is bilinear"),
        ({}, {"align_corners": True}, "bicubic (-0.75), not antialiased, border repeated, with aligned corners; right"),
        ({}, BY_FACTOR, "bicubic (-0.75), not antialiased, border repeated, by a factor from the size + 0.1; right is"),
        (
            BY_FACTOR,
            {},
            "bicubic (-0.75), not antialiased, border repeated, to the size; right is bicubic (-0.75), not",
        ),
    ],
)
def test_another_way_to_resize_is_named(right: dict[str, Any], wrong: dict[str, Any], label: str) -> None:
    (found,) = labels(tokens(resized(**right)), tokens(resized(**wrong)))
    assert found.startswith(f"pos resized {label}")


def test_rows_and_columns_exchanged_are_named() -> None:
    found = labels(tokens(resized()), tokens(resized(turned=True)))
    assert found == ["pos with rows and columns exchanged before it is resized"]


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1e-9 * RNG.normal(size=x.shape), lambda x: 1.0000001 * x, lambda x: np.roll(x, 1, axis=0)],
    ids=["noise", "a factor", "another order"],
)
def test_positions_that_no_way_explains_get_no_name(change: Callable[[NDArray], NDArray]) -> None:
    assert labels(tokens(resized()), tokens(change(resized(antialias=True)))) == []


def test_values_that_are_no_patches_with_positions_get_no_name() -> None:
    noise = RNG.normal(size=(2, 3 + 28, WIDTH))
    assert labels(noise, tokens(resized())) == []
    assert list(resize_otherwise(noise[:, :8], {"patches": PATCHES}, {"pos": POSITIONS})) == []
    assert list(resize_otherwise(PATCHES, {"patches": PATCHES}, {"pos": POSITIONS})) == []


def test_a_parameter_of_another_shape_is_not_taken_for_positions() -> None:
    # A lone number, as CLIP's scale of the logits, and a kernel with a square number of rows.
    parameters = {"logit_scale": np.array(2.66), "kernel.weight": RNG.normal(size=(SIDE**2, WIDTH))}
    assert list(resize_otherwise(tokens(resized()), {"patches": PATCHES}, parameters)) == []
