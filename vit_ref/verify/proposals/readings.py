"""Every way to read the values that a port shows: other axes, one of several in one, one layer of a stack.

Each only moves elements, as a table's selections do, and is written as Python code: what is printed is what was tried.
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

# So many elements tell two values apart: of one token in 257 that differs, four are seen.
SAMPLE = 1024

# Where a value belongs to, and which of how many parts of it.
Place = tuple[str, tuple[int, int] | None]
Shape = tuple[int, ...]

# Ways to order axes anew, by rank, in methods that NumPy, JAX and PyTorch share.
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
    """One way to read one of the port's values.

    Attributes:
      key: the value's name in a table, with `{i}` where there is one for each block.
      select: the code that picks it out of `x`; "" for all of it.
      place: the submodule whose parameter it is; for a site, its key.
      part: (parts, which) of a value that holds several.
      rank: the smaller is preferred among equal values.
      values: (blocks or 1, SAMPLE).
    """

    key: str
    select: str
    place: str
    part: tuple[int, int] | None
    rank: tuple[int, ...]
    values: NDArray


class Readings:
    """All readings of a port's values that have a given shape, those preferred among equal ones first.

    Args:
      shown: the port's values by key, in the order in which they came.
      shape: the shape.
      config: the model's configuration.
      parameters: whether these are parameters, which belong to submodules.

    Attributes:
      positions: the elements that are compared.
      single: readings of one value.
      blocked: readings of one value for each block, or of one that stacks the blocks on its first axis.
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
        # Outputs before inputs, what needs no selection before what does, the whole before an element; then the
        # outermost, which stays where it is when the author changes what is inside, and the first that had the value.
        rank = (":" in key, bool(select), "[" in key, 0 if self._parameters else key.count("."), order)
        values = np.stack([layer.reshape(-1)[self.positions] for layer in layers])
        return Reading(key, select, self._place(key), part, rank, values)

    def _place(self, key: str) -> str:
        return key.rpartition(".")[0] if self._parameters else key


def _ways(value: NDArray, shape: Shape, heads: int) -> Iterator[tuple[str, tuple[int, int] | None, NDArray]]:
    """Every way to read a value of that shape out of another: the code, which part it takes, and the result."""
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
    """The code of all equal parts of a value in which several are fused, such as query, key and value."""
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
    """The selection that a text means, which is built here and nowhere else."""
    return eval(f"lambda x: {select}")


def patterns(keys: Collection[str], depth: int) -> dict[str, list[str]]:
    """Keys by what they have in common: one number in them, the first that counts the blocks and nothing else."""
    members: dict[str, dict[int, str]] = {}
    for key in keys:
        path = re.split(r"[:\[]", key)[0]
        for number in re.finditer(r"(?<!\d)(0|[1-9]\d*)(?!\d)", path):
            pattern = f"{key[: number.start()]}{{i}}{key[number.end() :]}"
            members.setdefault(pattern, {})[int(number[0])] = key
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    # From left to right: mlp.0 and mlp.1 are no blocks where layers.0 and layers.1 are.
    for pattern in sorted(members, key=lambda pattern: pattern.index("{i}")):
        numbered = members[pattern]
        if numbered.keys() == set(range(depth)) and not taken & set(numbered.values()):
            found[pattern] = [numbered[i] for i in range(depth)]
            taken |= set(numbered.values())
    return found
