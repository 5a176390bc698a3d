"""Finds which parameter of a candidate is which of the reference: by equal values, also transposed or reshaped."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

# With more axes there are too many orders to try.
_MOST_AXES = 5
Move = Callable[[Any], Any]


def match_parameters(own: Mapping[str, NDArray], wanted: Mapping[str, NDArray]) -> dict[str, Any]:
    """Returns the table of parameters of a candidate, for `Candidate.parameters`.

    Args:
      own: the candidate's parameters.
      wanted: the reference's.

    Returns:
      From the candidate's paths to the reference's names, those that are told by their values. Parameters whose values
      several others have, such as zeros, are told by nothing and left out.
    """
    ours, theirs = _by_content(own), _by_content(wanted)
    table: dict[str, Any] = {}
    for content, names in theirs.items():
        paths = ours.get(content, [])
        if len(names) != 1 or len(paths) != 1:
            continue
        move = find_move(own[paths[0]], wanted[names[0]])
        if move is not None:
            table[paths[0]] = (names[0], move)
    return table


def find_move(value: NDArray, wanted: NDArray) -> Move | None:
    """Returns a function that moves a value's axes and reshapes it into the wanted one; None if none does."""
    return next((move for move in _moves(value.shape, wanted.shape) if np.array_equal(move(value), wanted)), None)


def _moves(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[Move]:
    yield partial(_move, before=shape, order=tuple(range(len(shape))), after=wanted)
    if len(shape) <= _MOST_AXES:
        for order in itertools.permutations(range(len(shape))):
            yield partial(_move, before=shape, order=order, after=wanted)
    if len(wanted) <= _MOST_AXES:
        for order in itertools.permutations(range(len(wanted))):
            # A reshape first, as of a kernel (D, H, K) into (D, H K), and then the axes.
            yield partial(_move, before=tuple(wanted[axis] for axis in np.argsort(order)), order=order, after=wanted)


def _move(x: Any, before: tuple[int, ...], order: tuple[int, ...], after: tuple[int, ...]) -> Any:
    return x.reshape(before).transpose(order).reshape(after)


def _by_content(parameters: Mapping[str, NDArray]) -> dict[tuple[int, str], list[str]]:
    found: dict[tuple[int, str], list[str]] = {}
    for name, value in parameters.items():
        if math.prod(value.shape):
            content = hashlib.blake2b(np.sort(value, axis=None).tobytes()).hexdigest()
            found.setdefault((value.size, content), []).append(name)
    return found
