"""Is a wrong value explained by its bug, and by no other?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.verify.diagnose.activations import ACTIVATIONS
from vit_ref.verify.diagnose.divergence import Divergence
from vit_ref.verify.diagnose.orders import reorder_elements
from vit_ref.verify.diagnose.predictions import Prediction, explain_by_order
from vit_ref.verify.diagnose.relations import change, explain_by_relation

RNG = np.random.default_rng(0)
X, OTHER = RNG.normal(size=(2, 2, 7, 14))
SCALE, BIAS = RNG.normal(size=(2, 14))
GAIN = np.array([0.3])
OF_HEADS = RNG.normal(size=7)
PARAMETERS = {
    "block.scale": SCALE,
    "block.bias": BIAS,
    "norm.g": GAIN,
    "heads.scale": OF_HEADS,
    "ones": np.ones(14),
    "one": np.ones(1),
}


def normed(x: NDArray, epsilon: float = 1e-5) -> NDArray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


# An image of PyTorch's: its channels are the second axis.
IMAGE = RNG.normal(size=(2, 14, 4, 5))
SCALES, BIASES = SCALE[:, None, None], BIAS[:, None, None]


# Weights of attention: two heads, five queries, two more keys before those of the queries.
WEIGHTS = np.exp(RNG.normal(size=(2, 2, 5, 7)))
CAUSAL = np.tril(np.ones((5, 7)), 2)


def weighed(mask: NDArray) -> NDArray:
    """Returns weights of attention under a mask."""
    return WEIGHTS * mask / (WEIGHTS * mask).sum(-1, keepdims=True)


def squares(x: NDArray) -> NDArray:
    """Returns the squares of two rows and two columns of an image, without the last column."""
    return x[..., :4].reshape(2, 14, 2, 2, 2, 2)


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
        (X * (1 + SCALE), X, {}, "without the scale 1 + block.scale (the value before it)"),
        (X * np.repeat(OF_HEADS, 2), X, {}, "without the scale heads.scale (the value before it)"),
        (X * SCALE, X * BIAS, {}, "scaled by block.bias, not by block.scale"),
        (X * (1 + SCALE), X * (1 + BIAS), {}, "scaled by 1 + block.bias, not by 1 + block.scale"),
        (X + SCALE, X + BIAS, {}, "block.bias added, not block.scale"),
        (normed(X, 0) * SCALE, normed(X, 1e-6) * SCALE, {"stream": X}, "epsilon 1e-06 for 0"),
        (normed(X) * SCALE, normed(X, 0) * SCALE, {"stream": X}, "epsilon 0 for 1e-05"),
        (
            normed(X) * SCALE + BIAS,
            (X - X.mean(-1, keepdims=True)) / (X.std(-1, keepdims=True) + 1e-6) * SCALE + BIAS,
            {"stream": X},
            "epsilon 1e-06 added to the square root, for 1e-05 inside",
        ),
        (
            normed(X) * SCALE + BIAS,
            (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True, ddof=1) + 1e-5) * SCALE + BIAS,
            {"stream": X},
            "the LayerNorm's variance with a divisor of n - 1, not n",
        ),
        (normed(X) * SCALE, normed(GELU(X)) * SCALE, {"stream": X}, "erf GELU before the LayerNorm"),
        (
            X,
            X.reshape(2, 7, 2, 7).swapaxes(1, 2).reshape(X.shape),
            {},
            "2 heads merged by a reshape alone, without exchanging heads and tokens",
        ),
        (
            IMAGE,
            IMAGE.swapaxes(1, 2).reshape(IMAGE.shape),
            {},
            "reshaped to (batch, heads, tokens, channels) without exchanging heads and tokens",
        ),
        (weighed(np.ones((5, 7))), weighed(CAUSAL), {}, "no query attends to a later key"),
        (weighed(CAUSAL), weighed(np.tril(CAUSAL, 1)), {}, "no query attends to its own key"),
        (
            weighed(CAUSAL),
            weighed(CAUSAL * (np.arange(7) > 1)),
            {},
            "no query attends to the first 2 keys",
        ),
        (
            squares(IMAGE).max((3, 5)),
            squares(IMAGE).mean((3, 5)),
            {"stream": IMAGE},
            "average pooling for max pooling",
        ),
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


def test_no_parameter_at_its_start_gives_its_name_to_a_factor() -> None:
    assert set(labels(X, 2 * X)) == {"2 x the reference", "each channel with another factor a channel"}
    assert set(labels(X, X + 1)) == {"another constant added to each channel"}


@pytest.mark.parametrize("shape", [(), (2, 0, 8)])
def test_a_value_without_axes_or_elements_is_given_no_name(shape: tuple[int, ...]) -> None:
    value = np.ones(shape)
    assert list(change(value, {"before": value})) == [] and list(reorder_elements(value)) == []
    assert list(explain_by_relation(value, 2 * value, {}, {})) == []


def test_lone_numbers_of_other_modules_do_not_explain_a_factor() -> None:
    parameters = {"block7.alpha": np.array(0.3), "block9.alpha": np.array(0.6)}
    causes = Divergence("site", 2 * X, X).causes(explain_by_relation(X, 2 * X, {}, parameters))
    assert causes and not [cause for cause in causes if "alpha" in cause.label]


def test_a_gate_of_flattened_tokens_is_named() -> None:
    both = RNG.normal(size=(14, 28))
    one, other = np.split(both, 2, axis=-1)
    truth = (ACTIVATIONS["SiLU"](one) * other).reshape(2, 7, 14)
    wrong = (ACTIVATIONS["ReLU"](one) * other).reshape(2, 7, 14)
    causes = Divergence("site", wrong, truth).causes(change(truth, {"both": both}))
    assert [cause.label for cause in causes] == ["ReLU for SiLU in the gate"]
