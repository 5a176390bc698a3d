"""Turns the inputs that both sides share into the arguments of one side, and its gradients into those of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import CandidateError
from vit_ref.verify.candidates.declaration import list_keywords
from vit_ref.verify.compare.inputs import is_float

Adapt = Callable[..., Any]


class Arguments(NamedTuple):
    """The arguments of a call, positional and by keyword. It is a tree for jax."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Feeding:
    """The arguments that one side makes of the inputs.

    The adaptor is called on the numbers of all elements in place of their values. The result shows where each element
    goes. So values of any dtype and gradients can be moved, whatever the adaptor is written in.

    Args:
      inputs: arrays by name.
      adapt: `adapt(**inputs)` returns a mapping of keyword arguments, a tuple of positional ones, or one array. None:
        one input is the first positional argument, several are keyword arguments.
      name: the side's name, for messages.

    Raises:
      CandidateError: the adaptor takes no input of a given name, raised an exception, returned no arrays, or computed
        values instead of moving them.
    """

    def __init__(self, inputs: Mapping[str, NDArray], adapt: Adapt | None, name: str):
        self._inputs, self._adapt, self._name = inputs, adapt, name
        self._sizes = {key: value.size for key, value in inputs.items() if is_float(value)}
        numbers, start = {}, 0
        for key, value in inputs.items():
            if is_float(value):
                numbers[key] = np.arange(start, start + value.size, dtype=np.float64).reshape(value.shape)
                start += value.size
            else:
                numbers[key] = value
        self._moved = self._adapted(numbers)
        self._values = np.concatenate([np.zeros(0), *(np.ravel(inputs[key]).astype(np.float64) for key in self._sizes)])
        self._require_moves(start)

    def arguments(self) -> Arguments:
        """Returns the arguments. Floats of the inputs are float32, and the rest is as the adaptor made it."""
        values = self._values.astype(np.float32)
        return _mapped(lambda leaf: values[leaf.astype(np.int64)] if is_float(leaf) else leaf, self._moved)

    def by_input(self, gradients: Arguments) -> dict[str, NDArray]:
        """Returns gradients with respect to the inputs that are floats, by name.

        Args:
          gradients: gradients with respect to the arguments. An argument that is no float may have None.
        """
        found: dict[str, NDArray] = {}
        # Keyword arguments are matched by name, because jax sorts the keys of a mapping.
        both = [
            *zip(self._moved.args, gradients.args, strict=True),
            *((moved, gradients.kwargs[name]) for name, moved in self._moved.kwargs.items()),
        ]
        pairs = [(moved, gradient) for moved, gradient in both if is_float(moved)]
        if not self._sizes:
            return found
        total = np.zeros(len(self._values), np.result_type(*(gradient for _, gradient in pairs), np.float32))
        for moved, gradient in pairs:
            np.add.at(total, moved.astype(np.int64), gradient)
        start = 0
        for key, size in self._sizes.items():
            found[name_input(key)] = total[start : start + size].reshape(self._inputs[key].shape)
            start += size
        return found

    def _adapted(self, inputs: Mapping[str, NDArray]) -> Arguments:
        if self._adapt is None:
            made: Any = tuple(inputs.values()) if len(inputs) == 1 else dict(inputs)
        else:
            taken = list_keywords(self._adapt)
            if unknown := [] if taken is None else [key for key in inputs if key not in taken]:
                raise CandidateError(
                    f"{self._name}: it takes no input {unknown[0]!r}, only {', '.join(taken or ()) or 'none at all'}:"
                    " correct the name of the input, or the argument of adapt="
                )
            try:
                made = self._adapt(**inputs)
            except Exception as error:
                raise CandidateError.raised(self._name, f"adapt() of {', '.join(inputs)}", error) from error
        if isinstance(made, Mapping):
            arguments = Arguments((), dict(made))
        else:
            arguments = Arguments(tuple(made) if isinstance(made, (tuple, list)) else (made,), {})
        for leaf in _leaves(arguments):
            if not isinstance(leaf, (np.ndarray, np.generic)) or leaf.dtype.kind not in "fiub":
                kind = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else f"a {type(leaf).__name__}"
                raise CandidateError(
                    f"{self._name}: adapt() returned {kind} among its arguments: return NumPy arrays of numbers, and"
                    " give other arguments in call="
                )
        return _mapped(np.asarray, arguments)

    def _require_moves(self, size: int) -> None:
        leaves, made = _leaves(self._moved), _leaves(self._adapted(self._inputs))
        for k, moved in enumerate(leaves):
            leaf: Any = made[k] if len(made) == len(leaves) else None
            if is_float(moved):
                numbers = moved.astype(np.int64)
                inside = ((numbers == moved) & (numbers >= 0) & (numbers < max(size, 1))).all() and size
                moves = inside and np.array_equal(self._values[numbers], leaf, equal_nan=True)
            else:  # The adaptor may not make integers of floats: it had positions in their place.
                moves = np.array_equal(moved, leaf)
            if not moves:
                raise CandidateError(
                    f"{self._name}: adapt() computes values: let it only move elements (transpose, reshape, index), or"
                    " add integer arrays, and compute in `load`'s model or in `inputs`"
                )


def name_input(name: str) -> str:
    """Returns the name of the gradient with respect to an input."""
    return f"input:{name}"


def cast_floats(inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Rounds floats once to float32. After that, only half precision rounds them again."""
    return {name: value.astype(np.float32) if is_float(value) else value for name, value in inputs.items()}


def _leaves(arguments: Arguments) -> list[Any]:
    return [*arguments.args, *arguments.kwargs.values()]


def _mapped(function: Callable[[Any], Any], arguments: Arguments) -> Arguments:
    return Arguments(
        tuple(map(function, arguments.args)), {name: function(value) for name, value in arguments.kwargs.items()}
    )
