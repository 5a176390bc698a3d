"""Rotary positions: finds their tables among the values of a reference, and turns tokens by them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tables(NamedTuple):
    """The cosines and the sines of the angles of each token (tokens, channels of a head)."""

    cos: NDArray
    sin: NDArray


def find_tables(values: Iterable[NDArray]) -> Tables | None:
    """Returns the last two neighbours among the values that are the cosines and the sines of the same angles.

    Args:
      values: values in the order of the pass.
    """
    found = None
    for cos, sin in itertools.pairwise(values):
        if cos.shape != sin.shape or not 2 <= cos.ndim <= 3 or cos.size != cos.shape[-1] * cos.shape[-2]:
            continue
        if not cos.size:  # such values would be tables of any angles
            continue
        # A model may have made its tables in float32.
        if np.allclose(np.square(cos) + np.square(sin), 1, rtol=0, atol=1e-6):
            found = Tables(cos.reshape(cos.shape[-2:]), sin.reshape(sin.shape[-2:]))
    return found


def turn(x: NDArray, tables: Tables, places: slice, *, halves: bool) -> NDArray:
    """Returns queries or keys (batch, tokens, channels of all heads) with some tokens turned by the first angles.

    Args:
      x: the queries or the keys.
      tables: the angles. A head has as many channels as they have.
      places: the tokens to turn.
      halves: whether channel k and channel k + half of a head are a pair; if not, neighbours are.
    """
    changed, size = x.copy(), tables.cos.shape[-1]
    if x.shape[-1] % size or size % 2:
        return changed
    tokens = x[:, places].reshape(len(x), -1, x.shape[-1] // size, size)
    cos, sin = (table[: tokens.shape[1], None] for table in tables)
    if halves:
        first, second = np.split(tokens, 2, axis=-1)
        beside = np.concatenate([-second, first], axis=-1)
    else:
        beside = np.stack([-tokens[..., 1::2], tokens[..., ::2]], axis=-1).reshape(tokens.shape)
    changed[:, places] = (tokens * cos + beside * sin).reshape(changed[:, places].shape)
    return changed
