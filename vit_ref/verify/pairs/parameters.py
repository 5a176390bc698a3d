"""Matches a candidate's parameters to the reference's by equal values, also if they are moved or fused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

# With more axes there are too many orders to try.
_MOST_AXES = 5
# The numbers of equal parts that a fused parameter may have: key and value, or query too.
_PARTS = (2, 3)
Move = Callable[[Any], Any]


def match_parameters(own: Mapping[str, NDArray], wanted: Mapping[str, NDArray]) -> dict[str, Any]:
    """Returns a candidate's table of parameters, for `Candidate.parameters`.

    Args:
      own: the candidate's parameters.
      wanted: the reference's parameters.

    Returns:
      The candidate's paths -> the reference's names. A parameter may hold several of the reference's side by side,
      such as one of query, key and value. Parameters that share their values with others, such as zeros, cannot be
      matched and are left out. So are parameters that are not floats.
    """
    own, wanted = _floats(own), _floats(wanted)
    ours, theirs = _by_content(own), _by_content(wanted)
    table: dict[str, Any] = {}
    for content, names in theirs.items():
        paths = ours.get(content, [])
        if len(names) != 1 or len(paths) != 1:
            continue
        move = find_move(own[paths[0]], wanted[names[0]])
        if move is not None:
            table[paths[0]] = (names[0], move)
    matched = {name for name, _ in table.values()}
    missing = {name: value for name, value in wanted.items() if name not in matched}
    fused = {path: _match_parts(value, missing) for path, value in own.items() if path not in table}
    return table | {path: targets for path, targets in fused.items() if targets}


def _match_parts(value: NDArray, wanted: Mapping[str, NDArray]) -> list[tuple[str, Move]]:
    """Returns the wanted parameters that equal parts of a value along one of its axes, with what picks each."""
    theirs = _by_content(wanted)
    sizes = {size for size, *_ in theirs}
    for axis, count in itertools.product(range(value.ndim), _PARTS):
        if value.shape[axis] % count or value.size // count not in sizes:
            continue
        found: list[tuple[str, Move]] = []
        for which, part in enumerate(np.split(value, count, axis=axis)):
            names = theirs.get(_content(part), []) if np.ptp(part) else []
            move = find_move(part, wanted[names[0]]) if len(names) == 1 else None
            if move is not None:
                found.append((names[0], partial(_pick, axis=axis, count=count, which=which, move=move)))
        if found:
            return found
    return []


def _pick(x: Any, axis: int, count: int, which: int, move: Move) -> Any:
    return move(np.split(x, count, axis=axis)[which])


def find_move(value: NDArray, wanted: NDArray) -> Move | None:
    """Returns a function that turns a value into the wanted one by moving, reshaping or flipping axes, or None."""
    return next((move for move in _moves(value.shape, wanted.shape) if np.array_equal(move(value), wanted)), None)


def _moves(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[Move]:
    yield partial(_move, before=shape, order=tuple(range(len(shape))), after=wanted)
    if len(shape) <= _MOST_AXES:
        for order in itertools.permutations(range(len(shape))):
            yield partial(_move, before=shape, order=order, after=wanted)
    if len(wanted) <= _MOST_AXES:
        for order in itertools.permutations(range(len(wanted))):
            # This reshapes first, for example a kernel (D, H, K) into (D, H K), and then moves the axes.
            yield partial(_move, before=tuple(wanted[axis] for axis in np.argsort(order)), order=order, after=wanted)
    # PyTorch's transposed convolution turns its kernel around, and Flax's does not. Spatial axes are last in PyTorch.
    if len(shape) == len(wanted) <= _MOST_AXES:
        for order in itertools.permutations(range(len(shape))):
            for spatial in (range(2, len(wanted)), range(len(wanted) - 2)):
                yield partial(_flip, order=order, axes=tuple(spatial))


def _move(x: Any, before: tuple[int, ...], order: tuple[int, ...], after: tuple[int, ...]) -> Any:
    return x.reshape(before).transpose(order).reshape(after)


def _flip(x: Any, order: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    return x.transpose(order)[tuple(slice(None, None, -1 if axis in axes else 1) for axis in range(len(order)))]


def _floats(parameters: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Returns the parameters that are floats, whose bits fit into an integer of NumPy's."""
    return {
        name: value
        for name, value in parameters.items()
        if jnp.issubdtype(value.dtype, jnp.floating) and value.itemsize <= np.dtype(np.uint64).itemsize
    }


def _by_content(parameters: Mapping[str, NDArray]) -> dict[tuple[int, ...], list[str]]:
    found: dict[tuple[int, ...], list[str]] = {}
    for name, value in parameters.items():
        if value.size:
            found.setdefault(_content(value), []).append(name)
    return found


def _content(value: NDArray) -> tuple[int, ...]:
    """Returns the size, and sums that do not depend on the order of the values.

    Sums of the bits cost a hundredth of sorting. `find_move` compares the values themselves.
    """
    bits = np.ravel(value, order="K").view(f"u{value.itemsize}").astype(np.uint64)
    return value.size, int(bits.sum()), int(np.square(bits).sum())
