"""Explains a wrong value if no formula is known, from the right value and the values before it.

An explanation is a whole value, which has to equal the candidate's to the last bits. `Divergence` decides whether it
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.activations import activate_otherwise, gate_otherwise
from vit_ref.verify.diagnose.channels import name_constants, name_factors
from vit_ref.verify.diagnose.masks import mask_otherwise
from vit_ref.verify.diagnose.norms import normalise_otherwise
from vit_ref.verify.diagnose.orders import reorder_elements
from vit_ref.verify.diagnose.predictions import IMAGE, Prediction, channel_axes, is_same, slope


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
    for axis in channel_axes(truth):
        moved = (np.moveaxis(truth, axis, -1), np.moveaxis(value, axis, -1))
        for label, found, form in _by_channel(
            *moved, {k: np.moveaxis(x, axis, -1) for k, x in terms.items()}, parameters
        ):
            yield Prediction(label, np.moveaxis(found, -1, axis), form)


def _by_channel(
    truth: NDArray, value: NDArray, terms: Mapping[str, NDArray], parameters: Mapping[str, NDArray]
) -> Iterator[Prediction]:
    axes = tuple(range(truth.ndim - 1))
    off = value - truth
    constant = off.mean(axis=axes)
    yield Prediction(name_constants(constant, parameters) or "another constant added to each channel", truth + constant)
    for site, x in terms.items():
        squares = np.square(x).sum(axis=axes)
        factors = np.divide((x * off).sum(axis=axes), squares, out=np.zeros_like(squares), where=squares > 0)
        known = name_factors(factors, parameters)
        what = f" at {site}" if site else ""
        label = f"{known}{what}" if known else f"{site or 'each channel'} with another factor a channel"
        yield Prediction(label, truth + factors * x)


def change(truth: NDArray, before: Mapping[str, NDArray]) -> Iterator[Prediction]:
    """Yields the value that other formulas would give, if the values before it show the right formula.

    Args:
      truth: the right value.
      before: the values before it, by site, the nearest first.
    """
    if not truth.ndim or not truth.size:
        return
    for site, x in before.items():
        yield from _pooled(truth, x)
        if x.size != truth.size:
            if x.size == 2 * truth.size and x.shape[-1] == 2 * truth.shape[-1]:
                first, second = (half.reshape(truth.shape) for half in np.split(x, 2, axis=-1))
                yield from gate_otherwise(truth, site, first, second)
            continue
        x = x.reshape(truth.shape)
        yield from activate_otherwise(truth, x)
        yield from normalise_otherwise(truth, x)
        if not np.array_equal(x, truth):
            yield Prediction(f"the value of {site} in its place", x)
    same = [(site, x) for site, x in before.items() if x.shape == truth.shape][:4]
    for k, (site, x) in enumerate(same):
        for other, y in same[k + 1 :]:
            yield from gate_otherwise(truth, f"{other} and {site}", y, x)
    yield from mask_otherwise(truth)
    yield from reorder_elements(truth)


def _pooled(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """Yields the other pooling, if the right value is the largest or the mean of squares of an image of PyTorch's."""
    if not truth.ndim == x.ndim == IMAGE or truth.shape[:2] != x.shape[:2] or not truth.size:
        return
    rows, columns = truth.shape[2:]
    side = x.shape[2] // rows
    if side < 2 or x.shape[3] // columns != side:
        return
    squares = x[:, :, : rows * side, : columns * side].reshape(*truth.shape[:3], side, columns, side)
    pooled = {"max pooling": squares.max(axis=(3, 5)), "average pooling": squares.mean(axis=(3, 5))}
    right = next((name for name, value in pooled.items() if is_same(value, truth)), None)
    for name, value in pooled.items() if right else ():
        if name != right:
            yield Prediction(f"{name} for {right}", value)
