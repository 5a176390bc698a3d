"""Lists every way to read a candidate's values: with other axes, as one of several fused values, as a layer of a stack.

A way only moves elements, as the selections of a table do. It is written as Python code, and the code that is printed
is the code that was tried.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.table import fitted

# So many elements tell two values apart: if one token in 257 differs, some four of its elements are among them.
SAMPLE = 1024

# The submodule or key of a value, and (number of parts, which part) if it holds several.
Place = tuple[str, tuple[int, int] | None]
Shape = tuple[int, ...]

# Ways to reorder axes, by rank, with methods that NumPy, JAX and PyTorch share.
_MOVES = {
    # (out, in) -> (in, out)
    2: ("", ".swapaxes(0, 1)"),
    # (B, D, P) -> (B, P, D); (N, B, D) -> (B, N, D); (D, H, K) -> (H, K, D)
    3: ("", ".swapaxes(1, 2)", ".swapaxes(0, 1)", ".swapaxes(0, 1).swapaxes(1, 2)"),
    # (B, H, N, K) -> (B, N, H, K); (B, D, rows, columns) -> (B, rows, columns, D); PyTorch's convolution -> flax's
    4: (
        "",
        ".swapaxes(1, 2)",
        ".swapaxes(1, 2).swapaxes(2, 3)",
        ".swapaxes(0, 3).swapaxes(0, 2).swapaxes(1, 2)",
    ),
}


class Reading(NamedTuple):
    """One way to read one of the candidate's values.

    Attributes:
      key: the value's key in a table, with `{i}` if each block has one.
      select: the code that selects it from `x`; "" for all of it.
      place: the submodule whose parameter it is; for a site, its key.
      part: (number of parts, which part) if the value holds several.
      rank: among equal values, the one with the smallest rank is preferred.
      values: float64 samples (blocks or 1, SAMPLE).
    """

    key: str
    select: str
    place: str
    part: tuple[int, int] | None
    rank: tuple[int, ...]
    values: NDArray


class Readings:
    """All readings of a candidate's values that have a given shape, the preferred ones first.

    Args:
      shown: the candidate's values by key, in the order of the run.
      shape: the shape.
      config: the model's configuration.
      parameters: whether these are parameters, which belong to submodules.

    Attributes:
      positions: the elements that are compared.
      single: readings of one value.
      blocked: readings of one value per block, or of one value that stacks the blocks on its first axis.
    """

    def __init__(self, shown: Mapping[str, NDArray], shape: Shape, config: ViTConfig, parameters: bool):
        self.positions = np.random.default_rng(0).integers(math.prod(shape), size=SAMPLE)
        self._parameters = parameters
        depth, heads = config.num_hidden_layers, config.num_attention_heads
        single: dict[tuple[str, str], Reading] = {}
        blocked = []
        for order, (key, value) in enumerate(shown.items()):
            for select, part, picked in _ways(value, shape, heads):
                single[key, select] = self._reading(key, select, part, order, [picked])
            if value.shape[:1] == (depth,):
                for layers in zip(*(_ways(layer, shape, heads) for layer in value), strict=True):
                    select, part, _ = layers[0]
                    blocked.append(self._reading(key, select, part, order, [picked for _, _, picked in layers]))
        for pattern, keys in patterns(shown, depth).items():
            for select in [select for key, select in single if key == keys[0]]:
                if all((key, select) in single for key in keys):
                    first = single[keys[0], select]
                    values = np.concatenate([single[key, select].values for key in keys])
                    blocked.append(first._replace(key=pattern, place=self._place(pattern), values=values))
        self.single = sorted(single.values(), key=lambda reading: reading.rank)
        self.blocked = sorted(blocked, key=lambda reading: reading.rank)

    def _reading(
        self, key: str, select: str, part: tuple[int, int] | None, order: int, layers: Sequence[NDArray]
    ) -> Reading:
        # Outputs come before inputs, whole values before selections and elements. Then the outermost module comes
        # first, because its key stays when the author changes its inside, and then the first that had the value.
        rank = (":" in key, bool(select), "[" in key, 0 if self._parameters else key.count("."), order)
        values = np.stack([layer.reshape(-1)[self.positions] for layer in layers])
        return Reading(key, select, self._place(key), part, rank, values)

    def _place(self, key: str) -> str:
        return key.rpartition(".")[0] if self._parameters else key


def _ways(value: NDArray, shape: Shape, heads: int) -> Iterator[tuple[str, tuple[int, int] | None, NDArray]]:
    """Yields every way to read a value of that shape from another: the code, the part that it takes, and the result."""
    parts, rest = divmod(value.size, math.prod(shape))
    if rest or parts not in (1, 2, 3):
        return
    for piece, part in _pieces(value.shape, parts, heads):
        rank = evaluate(f"x{piece}")(value).ndim
        for move in _MOVES.get(rank, ("",)):
            select = f"x{piece}{move}" if piece or move else ""
            picked = fitted(evaluate(select)(value) if select else value, shape)
            if picked.shape == shape:
                yield select, part, picked


def _pieces(shape: Shape, parts: int, heads: int) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yields the code of each part of a value that fuses several equal parts, such as query, key and value."""
    if parts == 1:
        yield "", None
        return
    for which in range(parts):
        part = parts, which
        for axis, at in ((-1, "..., "), (0, "")):
            ends = [f"{k} * x.shape[{axis}] // {parts}".removeprefix("1 * ") for k in (which, which + 1)]
            start = f"{ends[0]} " if which else ""
            stop = f" {ends[1]}" if which + 1 < parts else ""
            if shape[axis] % parts == 0:
                yield f"[{at}{start}:{stop}]", part
        for axis, size_of in enumerate(shape):
            if size_of == parts:
                yield f"[{':, ' * axis}{which}]", part
        # Fused head by head.
        if shape[-1] % (heads * parts) == 0:
            yield f".reshape(*x.shape[:-1], {heads}, {parts}, -1)[..., {which}, :]", part


def evaluate(select: str) -> Callable[[Any], Any]:
    """Returns the selection that a text describes. `_ways` is the only source of such texts.

    Args:
      select: a Python expression of `x`.
    """
    return eval(f"lambda x: {select}")


def patterns(keys: Collection[str], depth: int) -> dict[str, list[str]]:
    """Groups keys that differ in one number, which counts the blocks.

    Args:
      keys: the keys.
      depth: the number of blocks.

    Returns:
      Pattern with `{i}` -> the keys of blocks 0 to depth - 1.
    """
    members: dict[str, dict[int, str]] = {}
    for key in keys:
        path = re.split(r"[:\[]", key)[0]
        for number in re.finditer(r"(?<!\d)(0|[1-9]\d*)(?!\d)", path):
            pattern = f"{key[: number.start()]}{{i}}{key[number.end() :]}"
            members.setdefault(pattern, {})[int(number[0])] = key
    blocks: dict[str, list[str]] = {}
    taken: set[str] = set()
    # From left to right: if layers.0 and layers.1 are blocks, mlp.0 and mlp.1 inside them are not.
    for pattern in sorted(members, key=lambda pattern: pattern.index("{i}")):
        numbered = members[pattern]
        if numbered.keys() == set(range(depth)) and not taken & set(numbered.values()):
            blocks[pattern] = [numbered[i] for i in range(depth)]
            taken |= set(numbered.values())
    return blocks
