"""Is a wrong value explained by its bug, and by no other?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.diagnose.divergence import Divergence
from vit_ref.verify.diagnose.predictions import Prediction, explain_by_order
from vit_ref.verify.diagnose.relations import ACTIVATIONS, change, explain_by_relation

RNG = np.random.default_rng(0)
X, OTHER = RNG.normal(size=(2, 2, 7, 14))
SCALE, BIAS = RNG.normal(size=(2, 14))
GAIN = np.array([0.3])
PARAMETERS = {"block.scale": SCALE, "block.bias": BIAS, "norm.g": GAIN}


def normed(x: NDArray, epsilon: float = 1e-5) -> NDArray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


# An image of PyTorch's: its channels are the second axis.
IMAGE = RNG.normal(size=(2, 14, 4, 5))
SCALES, BIASES = SCALE[:, None, None], BIAS[:, None, None]


def grouped(x: NDArray, groups: int, epsilon: float = 1e-5) -> NDArray:
    """Normalises groups of the channels of an image."""
    rows = x.reshape(len(x), groups, -1)
    return ((rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + epsilon)).reshape(x.shape)


def labels(truth: NDArray, value: NDArray, **before: NDArray) -> list[str]:
    """Returns the explanations of a value, given the values before it."""

    def explanations() -> Iterator[Prediction]:
        yield from change(truth, before)
        yield from explain_by_relation(truth, value, before, PARAMETERS)
        yield from explain_by_order(truth, value, ("row", "token", "channel", "column")[: truth.ndim])

    found = Divergence("site", value, truth)
    return [cause.label for cause in found.causes(explanations(), found.by_value())]


GELU, TANH = ACTIVATIONS["erf GELU"], ACTIVATIONS["tanh GELU"]
WIDE = np.concatenate([X, OTHER], axis=-1)
SILU = ACTIVATIONS["SiLU"]


@pytest.mark.parametrize(
    ("truth", "value", "before", "label"),
    [
        (GELU(X), TANH(X), {"fc1": X}, "tanh GELU for erf GELU"),
        (TANH(X), GELU(X), {"fc1": X}, "erf GELU for tanh GELU"),
        (ACTIVATIONS["quick GELU"](X), GELU(X), {"fc1": X}, "erf GELU for quick GELU"),
        (np.maximum(X, 0), SILU(X), {"fc1": X}, "SiLU for ReLU"),
        (GELU(X), X, {"fc1": X}, "no activation for erf GELU"),
        (SILU(X) * OTHER, SILU(OTHER) * X, {"fused": WIDE}, "the first half of fused gated by the other"),
        (SILU(X) * OTHER, GELU(X) * OTHER, {"up": OTHER, "gate": X}, "erf GELU for SiLU in the gate"),
        (X, 0.5 * X, {}, "0.5 x the reference"),
        (X, -X, {}, "-1 x the reference"),
        (X, X[:, ::-1], {}, "another order along the token axis (6, 5, 4, 3, ...)"),
        (X, np.roll(X, 7, axis=-1), {}, "the two halves swapped"),
        (X, X[..., [*range(0, 14, 2), *range(1, 14, 2)]], {}, "the channels in halves, for interleaved ones"),
        (X, np.stack(np.split(X, 2, axis=-1), axis=-1).reshape(X.shape), {}, "the channels interleaved, for halves"),
        (X[:, :, :7], X[:, :, :7].swapaxes(1, 2), {}, "axes 1 and 2 exchanged"),
        (X + OTHER, OTHER, {"block": X}, "block not added"),
        (X + OTHER, X + 2 * OTHER, {"block": OTHER}, "block added once more"),
        (X + BIAS, X, {}, "block.bias not added"),
        (X * SCALE + OTHER, X + OTHER, {"mlp": X}, "without the scale block.scale at mlp"),
        (X * SCALE, X, {}, "without the scale block.scale (the value before it)"),
        (X * (1 + SCALE), X * SCALE, {}, "scaled by block.scale, not by 1 + block.scale"),
        (X * (1 + GAIN), X * GAIN, {}, "scaled by norm.g, not by 1 + norm.g"),
        (normed(X) * SCALE + BIAS, normed(X, 1e-6) * SCALE + BIAS, {"stream": X}, "epsilon 1e-06 for 1e-05"),
        (normed(X) * SCALE + BIAS, normed(X) * SCALE, {"stream": X}, "the LayerNorm without its bias"),
        (normed(X), X, {"stream": X}, "the value of stream in its place"),
        (X, X.astype("f4").astype("f8"), {}, "rounded to float32"),
        (
            np.where(IMAGE > 0, IMAGE, 0.1 * IMAGE),
            np.where(IMAGE > 0, IMAGE, 0.01 * IMAGE),
            {"norm": IMAGE},
            "leaky ReLU of slope 0.01 for leaky ReLU of slope 0.1",
        ),
        (IMAGE + BIASES, IMAGE, {}, "block.bias not added"),
        (IMAGE * SCALES, IMAGE, {}, "without the scale block.scale (the value before it)"),
        (
            grouped(IMAGE, 14) * SCALES + BIASES,
            grouped(IMAGE, 14, 1e-6) * SCALES + BIASES,
            {"conv": IMAGE},
            "epsilon 1e-06 for 1e-05",
        ),
        (
            grouped(IMAGE, 14) * SCALES + BIASES,
            grouped(IMAGE, 14) * SCALES,
            {"conv": IMAGE},
            "the InstanceNorm without its bias",
        ),
        (
            grouped(IMAGE, 14) * SCALES + BIASES,
            grouped(IMAGE, 2) * SCALES + BIASES,
            {"conv": IMAGE},
            "GroupNorm of 2 groups for InstanceNorm",
        ),
    ],
)
def test_what_was_done_is_named(truth: NDArray, value: NDArray, before: dict[str, NDArray], label: str) -> None:
    assert label in labels(truth, np.ascontiguousarray(value), **before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: GELU(x) + 1e-9 * OTHER**2,
        lambda x: np.sin(x),
        lambda x: GELU(x) * (1 + 1e-10 * np.abs(x)),
        lambda x: TANH(x) * 1.0000001,
    ],
    ids=["noise", "another function", "a tiny factor", "two faults"],
)
def test_what_nothing_explains_is_given_no_name(wrong: Callable[[NDArray], NDArray]) -> None:
    assert labels(GELU(X), wrong(X), fc1=X, stream=OTHER) == []


def test_a_fault_in_one_row_alone_is_named() -> None:
    value = GELU(X)
    value[1] = TANH(X)[1]
    assert "tanh GELU for erf GELU" in labels(GELU(X), value, fc1=X)
