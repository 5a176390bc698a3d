"""Explains a wrong value if no formula is known, from the right value and the values before it.

An explanation is a whole value, which has to equal the candidate's to the last bits. `Divergence` decides whether it
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import special

from vit_ref.verify.diagnose.predictions import Prediction, slope

ACTIVATIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "erf GELU": lambda x: x * special.ndtr(x),
    "tanh GELU": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick GELU": lambda x: x * special.expit(1.702 * x),
    "SiLU": lambda x: x * special.expit(x),
    "ReLU": lambda x: np.maximum(x, 0),
    "squared ReLU": lambda x: np.square(np.maximum(x, 0)),
    "leaky ReLU of slope 0.01": lambda x: np.where(x > 0, x, 0.01 * x),
    "leaky ReLU of slope 0.1": lambda x: np.where(x > 0, x, 0.1 * x),
    "leaky ReLU of slope 0.2": lambda x: np.where(x > 0, x, 0.2 * x),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "softplus": lambda x: np.logaddexp(x, 0),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "no activation": lambda x: x,
}
EPSILONS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)
# Two right values in float64 differ by less than this, and two formulas by more.
_SAME = 1e-10
# A norm over fewer channels is no norm that anybody uses.
_NORMED = 3
# An image has so many axes, with its batch and its channels.
_IMAGE = 4
# At least so many rows are needed to find a factor for each channel.
_ROWS = 6


def explain_by_relation(
    truth: NDArray, value: NDArray, before: Mapping[str, NDArray], parameters: Mapping[str, NDArray]
) -> Iterator[Prediction]:
    """Yields explanations that are fitted to the wrong value: a term left out or added, or a number for each channel.

    Args:
      truth: the right value.
      value: the candidate's value.
      before: the reference's values before it, by site, the nearest first.
      parameters: the reference's parameters, by name.
    """
    off = value - truth
    shaped = {site: x.reshape(truth.shape) for site, x in before.items() if x.size == truth.size}
    for site, x in shaped.items():
        factor = slope(x, off)
        label = {-1.0: f"{site} not added", 1.0: f"{site} added once more"}.get(round(factor, 9))
        yield Prediction(label or f"{factor:.6g} x {site} added", truth + factor * x)
    terms = {"": truth, **shaped}
    for axis in _channel_axes(truth):
        moved = (np.moveaxis(truth, axis, -1), np.moveaxis(value, axis, -1))
        for label, found, form in _by_channel(
            *moved, {k: np.moveaxis(x, axis, -1) for k, x in terms.items()}, parameters
        ):
            yield Prediction(label, np.moveaxis(found, -1, axis), form)


def _channel_axes(value: NDArray) -> list[int]:
    """Returns the axes that may be the channels of a value: the last, and in an image of PyTorch's the second."""
    axes = [-1, 1] if value.ndim >= _IMAGE else [-1]
    return [axis for axis in axes if value.size // value.shape[axis] >= _ROWS]


def _by_channel(
    truth: NDArray, value: NDArray, terms: Mapping[str, NDArray], parameters: Mapping[str, NDArray]
) -> Iterator[Prediction]:
    axes = tuple(range(truth.ndim - 1))
    off = value - truth
    constant = off.mean(axis=axes)
    yield Prediction(
        _named(constant, parameters, _CONSTANTS) or "another constant added to each channel", truth + constant
    )
    for site, x in terms.items():
        squares = np.square(x).sum(axis=axes)
        factors = np.divide((x * off).sum(axis=axes), squares, out=np.zeros_like(squares), where=squares > 0)
        known = _named(factors, parameters, _FACTORS)
        what = f" at {site}" if site else ""
        label = f"{known}{what}" if known else f"{site or 'each channel'} with another factor a channel"
        yield Prediction(label, truth + factors * x)


# How each bug with a parameter p changes a value of 1.
_FACTORS: dict[str, Callable[[NDArray], NDArray]] = {
    "without the scale {}": lambda p: 1 - p,
    "without the scale {} (the value before it)": lambda p: 1 / p - 1,
    "scaled twice by {}": lambda p: p - 1,
    "scaled by 1 + {}": lambda p: p,
    "scaled by {0}, not by 1 + {0}": lambda p: -1 / (1 + p),
}
_CONSTANTS: dict[str, Callable[[NDArray], NDArray]] = {
    "{} not added": lambda p: -p,
    "{} added once more": lambda p: p,
}


def _named(
    found: NDArray, parameters: Mapping[str, NDArray], ways: Mapping[str, Callable[[NDArray], NDArray]]
) -> str | None:
    """Returns the bug, with its parameter, that explains the numbers of all channels; None if none does."""
    for name, parameter in parameters.items():
        # A single number may scale or shift all channels.
        if parameter.size not in (1, found.size):
            continue
        for label, way in ways.items():
            with np.errstate(divide="ignore"):
                if _is_same(np.broadcast_to(way(parameter.reshape(-1)), found.shape), found):
                    return label.format(name)
    return None


def change(truth: NDArray, before: Mapping[str, NDArray]) -> Iterator[Prediction]:
    """Yields the value that other formulas would give, if the values before it show the right formula.

    Args:
      truth: the right value.
      before: the values before it, by site, the nearest first.
    """
    for site, x in before.items():
        if x.size != truth.size:
            if x.size == 2 * truth.size and x.shape[-1] == 2 * truth.shape[-1]:
                yield from _gated(truth, site, *np.split(x, 2, axis=-1))
            continue
        x = x.reshape(truth.shape)
        yield from _activated(truth, x)
        yield from _normalised(truth, x)
        if not np.array_equal(x, truth):
            yield Prediction(f"the value of {site} in its place", x)
    same = [(site, x) for site, x in before.items() if x.shape == truth.shape][:4]
    for k, (site, x) in enumerate(same):
        for other, y in same[k + 1 :]:
            yield from _gated(truth, f"{other} and {site}", y, x)
    for size in _parts(truth.shape[-1]):
        heads = truth.reshape(*truth.shape[:-1], -1, size)
        label = "" if size == truth.shape[-1] else f" of every {size} channels"
        yield Prediction(f"the two halves{label} swapped", np.roll(heads, size // 2, axis=-1).reshape(truth.shape))
        yield Prediction(f"the channels{label} in halves, for interleaved ones", interleave(truth, size))
        yield Prediction(f"the channels{label} interleaved, for halves", interleave(truth, size, back=True))
    for axis in range(truth.ndim):
        yield Prediction(f"reversed along axis {axis}", np.flip(truth, axis))
    for first in range(1, truth.ndim):
        for second in range(first + 1, truth.ndim):
            if truth.shape[first] == truth.shape[second]:
                yield Prediction(f"axes {first} and {second} exchanged", np.swapaxes(truth, first, second))


def reorder(weight: NDArray) -> Iterator[Prediction]:
    """Yields a weight with its elements in the orders that an author mistakes for the right one.

    Args:
      weight: a matrix, or a kernel of a convolution with its spatial axes last.
    """
    spatial = tuple(range(2, weight.ndim))
    if weight.ndim >= 2 and weight.shape[0] == weight.shape[1]:
        yield Prediction("transposed", np.swapaxes(weight, 0, 1))
    if any(weight.shape[axis] > 1 for axis in spatial):
        yield Prediction("flipped", np.flip(weight, spatial))
    if len(spatial) == 2 and weight.shape[2] == weight.shape[3] > 1:
        yield Prediction("with its two spatial axes exchanged", np.swapaxes(weight, 2, 3))


def interleave(x: NDArray, size: int, *, back: bool = False) -> NDArray:
    """Moves the first of each pair of channels into the first half of every `size` channels, or back.

    Args:
      x: the value.
      size: the number of channels that are moved together.
      back: whether to make pairs (0, 1), (2, 3), ... from the halves instead.
    """
    heads = x.reshape(*x.shape[:-1], -1, size)
    split = (2, size // 2) if back else (size // 2, 2)
    return np.swapaxes(heads.reshape(*heads.shape[:-1], *split), -1, -2).reshape(x.shape)


def _parts(width: int) -> list[int]:
    """Returns even sizes into which a width can be divided, the whole width first."""
    return [
        size
        for size in (width, *(width // heads for heads in range(2, 33) if width % heads == 0))
        if size % 2 == 0 and size > 2
    ][:6]


def _activated(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    right = next((name for name, f in ACTIVATIONS.items() if _is_same(f(x), truth)), None)
    for name, f in ACTIVATIONS.items() if right and right != "no activation" else ():
        if name != right:
            yield Prediction(f"{name} for {right}", f(x))


def _gated(truth: NDArray, site: str, one: NDArray, other: NDArray) -> Iterator[Prediction]:
    """Yields bugs of a gated unit, which is the activation of one half times the other half."""
    for gate, up, swapped in ((one, other, "first"), (other, one, "second")):
        right = next((name for name, f in ACTIVATIONS.items() if _is_same(f(gate) * up, truth)), None)
        for name, f in ACTIVATIONS.items() if right else ():
            if name != right:
                yield Prediction(f"{name} for {right} in the gate", f(gate) * up)
            else:
                yield Prediction(f"the {swapped} half of {site} gated by the other", f(up) * gate)


def _normalised(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """Yields norms with another epsilon, of another kind, or without scale or bias."""
    for axis in _channel_axes(truth):
        if truth.shape[axis] >= _NORMED:
            for label, value, form in _normalised_last(np.moveaxis(truth, axis, -1), np.moveaxis(x, axis, -1)):
                yield Prediction(label, np.moveaxis(value, -1, axis), form)


def _normalised_last(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """Yields the same for a value whose last axis are the channels."""
    norms = _norms(truth)
    for kind, standardise in norms.items():
        for epsilon in EPSILONS:
            scaled = standardise(x, epsilon)
            scale, bias = _line(scaled, truth)
            if not _is_same(scaled * scale + bias, truth):
                continue
            for other in EPSILONS:
                if other != epsilon:
                    yield Prediction(f"epsilon {other:g} for {epsilon:g}", standardise(x, other) * scale + bias)
            yield Prediction(f"the {kind} without its scale", scaled + bias)
            yield Prediction(f"the {kind} without its bias", scaled * scale)
            yield Prediction(f"the {kind} without scale and bias", scaled)
            yield Prediction(f"the {kind} with 1 + its scale", scaled * (1 + scale) + bias)
            for name, another in norms.items():
                if name != kind:
                    yield Prediction(f"{name} for {kind}", another(x, epsilon) * scale + bias)
            return


def _layer_norm(x: NDArray, epsilon: float) -> NDArray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)


def _rms_norm(x: NDArray, epsilon: float) -> NDArray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon)


def _group_norm(x: NDArray, epsilon: float, groups: int) -> NDArray:
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)


def _norms(value: NDArray) -> dict[str, Callable[[NDArray, float], NDArray]]:
    """Returns the norms that a value of this shape may be the output of."""
    norms: dict[str, Callable[[NDArray, float], NDArray]] = {"LayerNorm": _layer_norm, "RMSNorm": _rms_norm}
    if value.ndim < _IMAGE:
        return norms
    channels = value.shape[-1]
    groups = [n for n in (1, 2, 4, 8, 16, 32) if channels % n == 0 and n < channels]
    grouped = {f"GroupNorm of {n} groups": partial(_group_norm, groups=n) for n in groups}
    return norms | {"InstanceNorm": partial(_group_norm, groups=channels)} | grouped


def _line(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Returns the slope and the constant of y over x, for each channel."""
    axes = tuple(range(x.ndim - 1))
    mean_x, mean_y = x.mean(axis=axes), y.mean(axis=axes)
    squares = np.square(x - mean_x).sum(axis=axes)
    slopes = ((x - mean_x) * (y - mean_y)).sum(axis=axes)
    slopes = np.divide(slopes, squares, out=np.zeros_like(squares), where=squares > 0)
    return slopes, mean_y - slopes * mean_x


def _is_same(one: NDArray, other: NDArray) -> bool:
    size = float(np.linalg.norm(other))
    return bool(np.isfinite(one).all()) and size > 0 and float(np.linalg.norm(one - other)) <= _SAME * size
