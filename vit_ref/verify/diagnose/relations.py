"""What a wrong value can be where no formula is known: told by the right value and the values before it.

An explanation is a whole value, which has to meet the candidate's to the last bits. Nothing here decides; `Divergence`
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "no activation": lambda x: x,
}
EPSILONS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)
# Two right values in float64 are nearer than this, and two formulas further apart.
_SAME = 1e-10
# A factor a channel is found from at least so many rows.
_ROWS = 6


def explain_by_relation(
    truth: NDArray, value: NDArray, before: Mapping[str, NDArray], parameters: Mapping[str, NDArray]
) -> Iterator[Prediction]:
    """Yields what is fitted to the wrong value: a term that is missing or too much, a scale or a constant a channel.

    Args:
      truth: the right value.
      value: the candidate's.
      before: the reference's values before it, by site, the nearest first.
      parameters: the reference's, by name.
    """
    off = value - truth
    shaped = {site: x.reshape(truth.shape) for site, x in before.items() if x.size == truth.size}
    for site, x in shaped.items():
        factor = slope(x, off)
        label = {-1.0: f"{site} not added", 1.0: f"{site} added once more"}.get(round(factor, 9))
        yield Prediction(label or f"{factor:.6g} x {site} added", truth + factor * x)
    rows = truth.size // truth.shape[-1]
    if rows >= _ROWS:
        yield from _by_channel(truth, value, {"": truth, **shaped}, parameters)


def _by_channel(
    truth: NDArray, value: NDArray, terms: Mapping[str, NDArray], parameters: Mapping[str, NDArray]
) -> Iterator[Prediction]:
    axes = tuple(range(truth.ndim - 1))
    off = value - truth
    constant = off.mean(axis=axes)
    yield Prediction(
        _named(constant, parameters, _CONSTANTS) or "a constant of its own added to each channel", truth + constant
    )
    for site, x in terms.items():
        squares = np.square(x).sum(axis=axes)
        factors = np.divide((x * off).sum(axis=axes), squares, out=np.zeros_like(squares), where=squares > 0)
        known = _named(factors, parameters, _FACTORS)
        what = f" at {site}" if site else ""
        label = f"{known}{what}" if known else f"{site or 'each channel'} with another factor a channel"
        yield Prediction(label, truth + factors * x)


# What a parameter p does to a value of 1, by what was done to it.
_FACTORS: dict[str, Callable[[NDArray], NDArray]] = {
    "without the scale {}": lambda p: 1 - p,
    "without the scale {} (the value before it)": lambda p: 1 / p - 1,
    "scaled twice by {}": lambda p: p - 1,
    "scaled by 1 + {}": lambda p: p,
}
_CONSTANTS: dict[str, Callable[[NDArray], NDArray]] = {
    "{} not added": lambda p: -p,
    "{} added once more": lambda p: p,
}


def _named(
    found: NDArray, parameters: Mapping[str, NDArray], ways: Mapping[str, Callable[[NDArray], NDArray]]
) -> str | None:
    """What was done with which parameter, where one explains the numbers a channel."""
    for name, parameter in parameters.items():
        if parameter.size != found.size:
            continue
        for label, way in ways.items():
            with np.errstate(divide="ignore"):
                if _is_same(way(parameter.reshape(found.shape)), found):
                    return label.format(name)
    return None


def change(truth: NDArray, before: Mapping[str, NDArray]) -> Iterator[Prediction]:
    """Yields what the value would be with another formula, if its inputs tell the right one.

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


def interleave(x: NDArray, size: int, *, back: bool = False) -> NDArray:
    """Makes halves of every `size` channels from the pairs (0, 1), (2, 3), ..., or the other way round."""
    heads = x.reshape(*x.shape[:-1], -1, size)
    split = (2, size // 2) if back else (size // 2, 2)
    return np.swapaxes(heads.reshape(*heads.shape[:-1], *split), -1, -2).reshape(x.shape)


def _parts(width: int) -> list[int]:
    """Even sizes that a width falls into, all of it first."""
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
    """A gated unit: the activation of one half times the other."""
    for gate, up, swapped in ((one, other, "first"), (other, one, "second")):
        right = next((name for name, f in ACTIVATIONS.items() if _is_same(f(gate) * up, truth)), None)
        for name, f in ACTIVATIONS.items() if right else ():
            if name != right:
                yield Prediction(f"{name} for {right} in the gate", f(gate) * up)
            else:
                yield Prediction(f"the {swapped} half of {site} gated by the other", f(up) * gate)


def _normalised(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """A norm with another epsilon, of another kind, or without its scale or bias."""
    if truth.shape[-1] < 3 or truth.size // truth.shape[-1] < _ROWS:
        return
    for kind, standardise in _NORMS.items():
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
            for name, another in _NORMS.items():
                if name != kind:
                    yield Prediction(f"{name} for {kind}", another(x, epsilon) * scale + bias)
            return


def _layer_norm(x: NDArray, epsilon: float) -> NDArray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)


def _rms_norm(x: NDArray, epsilon: float) -> NDArray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon)


_NORMS = {"LayerNorm": _layer_norm, "RMSNorm": _rms_norm}


def _line(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Slope and constant of y over x, channel by channel."""
    axes = tuple(range(x.ndim - 1))
    mean_x, mean_y = x.mean(axis=axes), y.mean(axis=axes)
    squares = np.square(x - mean_x).sum(axis=axes)
    slopes = ((x - mean_x) * (y - mean_y)).sum(axis=axes)
    slopes = np.divide(slopes, squares, out=np.zeros_like(squares), where=squares > 0)
    return slopes, mean_y - slopes * mean_x


def _is_same(one: NDArray, other: NDArray) -> bool:
    size = float(np.linalg.norm(other))
    return bool(np.isfinite(one).all()) and size > 0 and float(np.linalg.norm(one - other)) <= _SAME * size
