"""Inputs of a computation: one array of images, or any arrays by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The first axis of each array is the batch. Arrays of floats are cast to the precision that is computed in; arrays of
# integers and booleans (token ids, masks) stay as they are, and have no gradients.
Inputs = NDArray | Mapping[str, NDArray]


def is_float(value: Any) -> bool:
    """Tells whether an array holds floats, which are cast and differentiated."""
    return np.issubdtype(value.dtype, np.floating)


def map_arrays(function: Callable[[NDArray], NDArray], inputs: Inputs) -> Any:
    """Applies a function to each array."""
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    return function(inputs)


def count_rows(inputs: Inputs) -> int:
    """Returns the number of rows in the batch."""
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def take_rows(inputs: Inputs, rows: slice) -> Any:
    """Returns some rows of the batch. An array with another number of rows is kept whole."""
    batch = count_rows(inputs)
    return map_arrays(lambda value: value[rows] if value.ndim and len(value) == batch else value, inputs)


def copy_inputs(inputs: Inputs) -> Any:
    """Copies the arrays, so that an implementation may write into them."""
    return map_arrays(np.copy, inputs)


def is_same(one: Inputs, other: Inputs) -> bool:
    """Tells whether all arrays of two inputs are equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(np.array_equal(one[name], other[name]) for name in one)
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))
