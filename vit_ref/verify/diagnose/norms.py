"""Recognises a norm and its epsilon, and predicts what a wrong norm would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.activations import ACTIVATIONS
from vit_ref.verify.diagnose.predictions import IMAGE, SAME, Prediction, channel_axes, distance

EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)
# A norm over fewer channels is no norm that anybody uses.
_NORMED = 3


class Moments(NamedTuple):
    """A value as a norm sees it.

    Attributes:
      centred: the value less its mean, or the value itself.
      variance: the mean of its squares.
      number: how many elements a mean is of.
    """

    centred: NDArray
    variance: NDArray
    number: int

    def standardise(self, epsilon: float) -> NDArray:
        """Returns the normalised value. It is not finite if both epsilon and a variance are zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.centred / np.sqrt(self.variance + epsilon)


def normalise_otherwise(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """Yields norms with another epsilon, of another kind, or without scale or bias, if the right value is a norm's.

    Args:
      truth: the right value.
      x: the value before it.
    """
    for axis in channel_axes(truth):
        if truth.shape[axis] >= _NORMED:
            for label, value, form in _normalise_last(np.moveaxis(truth, axis, -1), np.moveaxis(x, axis, -1)):
                yield Prediction(label, np.moveaxis(value, -1, axis), form)


def _normalise_last(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """Yields the same for a value whose last axis are the channels."""
    norms = _norms(truth)
    for kind, norm in norms.items():
        moments = norm(x)
        fits = {epsilon: distance(_fitted(moments, epsilon, truth), truth) for epsilon in EPSILONS}
        # One that is off by a little fits, too, but less well.
        epsilon = min(fits, key=lambda each: fits[each])
        if fits[epsilon] > SAME:
            continue
        scaled = moments.standardise(epsilon)
        scale, bias = _line(scaled, truth)
        for other in EPSILONS:
            if other != epsilon:
                yield Prediction(f"epsilon {other:g} for {epsilon:g}", moments.standardise(other) * scale + bias)
        for other in filter(None, EPSILONS):
            added = moments.centred / (np.sqrt(moments.variance) + other)
            yield Prediction(
                f"epsilon {other:g} added to the square root, for {epsilon:g} inside", added * scale + bias
            )
        yield Prediction(f"the {kind} without its scale", scaled + bias)
        yield Prediction(f"the {kind} without its bias", scaled * scale)
        yield Prediction(f"the {kind} without scale and bias", scaled)
        yield Prediction(f"the {kind} with 1 + its scale", scaled * (1 + scale) + bias)
        if moments.number > 1:
            wider = moments._replace(variance=moments.variance * moments.number / (moments.number - 1))
            label = f"the {kind}'s variance with a divisor of n - 1, not n"
            yield Prediction(label, wider.standardise(epsilon) * scale + bias)
        for name, another in norms.items():
            if name != kind:
                yield Prediction(f"{name} for {kind}", another(x).standardise(epsilon) * scale + bias)
        for name, activation in ACTIVATIONS.items():
            if name != "no activation":
                after = norm(activation(x)).standardise(epsilon)
                yield Prediction(f"{name} before the {kind}", after * scale + bias)
        return


def _fitted(moments: Moments, epsilon: float, truth: NDArray) -> NDArray:
    """Returns the norm with that epsilon, and with the scale and the bias that come closest to the right value."""
    scaled = moments.standardise(epsilon)
    scale, bias = _line(scaled, truth)
    return scaled * scale + bias


def _layer_norm(x: NDArray) -> Moments:
    return Moments(x - x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True), x.shape[-1])


def _rms_norm(x: NDArray) -> Moments:
    return Moments(x, np.square(x).mean(axis=-1, keepdims=True), x.shape[-1])


def _group_norm(x: NDArray, groups: int) -> Moments:
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = (each(axis=(1, 3), keepdims=True) for each in (grouped.mean, grouped.var))
    return Moments(
        (grouped - mean).reshape(x.shape),
        np.broadcast_to(variance, grouped.shape).reshape(x.shape),
        grouped.shape[1] * grouped.shape[3],
    )


def _norms(value: NDArray) -> dict[str, Callable[[NDArray], Moments]]:
    """Returns the norms that a value of this shape may be the output of."""
    norms: dict[str, Callable[[NDArray], Moments]] = {"LayerNorm": _layer_norm, "RMSNorm": _rms_norm}
    if value.ndim < IMAGE:
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
