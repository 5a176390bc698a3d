"""Computes in float64, with NumPy alone, what the frameworks' values are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def gelu_erf(x: Array) -> Array:
    """Returns x times the normal distribution function, by `erfc`, which keeps its digits in the left tail."""
    half_erfc = np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))
    return np.asarray(x * half_erfc(x))


def gelu_tanh(x: Array) -> Array:
    """Returns the tanh form, written as a logistic function, which keeps its digits in the left tail."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return np.asarray(x / (1 + np.exp(-2 * inner)))


def layer_norm(x: Array, epsilon: float) -> Array:
    """Returns rows of mean 0 and deviation 1, without scale and bias."""
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon))


def softmax(x: Array) -> Array:
    """Returns probabilities along the last axis."""
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


def attention(query: Array, key: Array, value: Array) -> Array:
    """Returns softmax(QKᵀ/√d)V of (batch, tokens, heads, width)."""
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return np.asarray(np.einsum("bhqk,bkhd->bqhd", softmax(scores), value))


def cubic(distance: Array, a: float) -> Array:
    """Returns Keys' cubic kernel of coefficient `a` (R. Keys, 1981)."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0)))


def resize_matrix(size: int, new_size: int, a: float, border: str, antialias: bool, align_corners: bool) -> Array:
    """Returns the (new_size, size) matrix of a one-dimensional resize.

    Args:
        size: number of samples.
        new_size: number of samples of the result.
        a: the kernel's coefficient.
        border: "clamp" takes the edge's value for what lies outside; "renormalise" leaves it out and divides by the
            weights that remain.
        antialias: widens the kernel by the factor of a reduction.
        align_corners: the centres of the first and last samples stay where they are.
    """
    scale = size / new_size
    centres = (
        np.arange(new_size) * (size - 1) / (new_size - 1)
        if align_corners
        else (np.arange(new_size) + 0.5) * scale - 0.5
    )
    width = max(scale, 1.0) if antialias else 1.0
    reach = math.ceil(2 * width) + 1
    positions = np.arange(-reach, size + reach)
    weights = cubic((positions[None, :] - centres[:, None]) / width, a)
    if border == "clamp":
        matrix = np.zeros((new_size, size))
        np.add.at(matrix.T, np.clip(positions, 0, size - 1), weights.T)
    else:
        matrix = weights[:, reach : reach + size]
    return np.asarray(matrix / matrix.sum(-1, keepdims=True))


def describe_resize(
    resize: Callable[[Array, int, int], Array], image: Array, height: int, width: int
) -> dict[str, Any]:
    """Finds the bicubic resize that `resize` makes of `image` (height, width), and its relative RMS error."""
    value = np.asarray(resize(image, height, width), np.float64)
    best: dict[str, Any] = {}
    ways = product((-0.5, -0.6, -0.75), ("clamp", "renormalise"), (False, True), (False, True))
    for a, border, antialias, align_corners in ways:
        rows = resize_matrix(image.shape[0], height, a, border, antialias, align_corners)
        columns = resize_matrix(image.shape[1], width, a, border, antialias, align_corners)
        expected = rows @ image @ columns.T
        error = relative_rms(value, expected)
        if not best or error < best["error"]:
            best = {
                "a": a, "border": border, "antialias": antialias, "align_corners": align_corners, "error": error,
            }  # fmt: skip
    return best


def relative_rms(value: Array, expected: Array) -> float:
    """Returns the root mean square of the difference over that of `expected`."""
    difference = np.asarray(value, np.float64) - expected
    return float(np.sqrt((difference**2).mean() / (expected**2).mean()))
