"""Names the parameters that explain a factor or a constant for each channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.predictions import SAME, is_same

Way = Callable[[NDArray], NDArray]
# How each bug with a parameter p changes a value of 1.
_FACTORS: dict[str, Way] = {
    "without the scale {}": lambda p: 1 - p,
    "without the scale {} (the value before it)": lambda p: 1 / p - 1,
    "without the scale 1 + {} (the value before it)": lambda p: 1 / (1 + p) - 1,
    "scaled twice by {}": lambda p: p - 1,
    "scaled by 1 + {}": lambda p: p,
    "scaled by {0}, not by 1 + {0}": lambda p: -1 / (1 + p),
}
_CONSTANTS: dict[str, Way] = {
    "{} not added": lambda p: -p,
    "{} added once more": lambda p: p,
}
# The parameter that stands in the place of p, from p and the factor or the constant.
_OTHER_SCALES: dict[str, Callable[[NDArray, NDArray], NDArray]] = {
    "scaled by {}, not by {}": lambda p, found: p * (1 + found),
    "scaled by 1 + {}, not by 1 + {}": lambda p, found: (1 + p) * (1 + found) - 1,
}
_OTHER_TERMS: dict[str, Callable[[NDArray, NDArray], NDArray]] = {"{} added, not {}": lambda p, found: p + found}


def name_factors(found: NDArray, parameters: Mapping[str, NDArray]) -> str | None:
    """Returns the bug, with its parameters, that multiplies the channels by 1 + `found`; None if none does.

    Args:
      found: a number for each channel.
      parameters: the reference's parameters, by name.
    """
    return _of_one(found, parameters, _FACTORS) or _of_two(found, parameters, _OTHER_SCALES)


def name_constants(found: NDArray, parameters: Mapping[str, NDArray]) -> str | None:
    """Returns the bug, with its parameters, that adds `found` to the channels; None if none does.

    Args:
      found: a number for each channel.
      parameters: the reference's parameters, by name.
    """
    return _of_one(found, parameters, _CONSTANTS) or _of_two(found, parameters, _OTHER_TERMS)


def _telling(found: NDArray, parameters: Mapping[str, NDArray]) -> Iterator[tuple[str, NDArray, int]]:
    """Yields the parameters that may act on each channel, or on each head, with the channels that one number acts on.

    One whose numbers are all the same, as at its start, is left out: any factor would be a relation to it.
    """
    for name, parameter in parameters.items():
        flat = parameter.reshape(-1)
        each, rest = divmod(found.size, flat.size or found.size + 1)
        same = flat.size and (flat == flat[0]).all() and (flat.size > 1 or flat[0] in (0, 1))
        if not rest and each and not same:
            yield name, flat, each


def _of_one(found: NDArray, parameters: Mapping[str, NDArray], ways: Mapping[str, Way]) -> str | None:
    for name, parameter, each in _telling(found, parameters):
        for label, way in ways.items():
            with np.errstate(divide="ignore"):
                if is_same(np.repeat(way(parameter), each), found):
                    return label.format(name)
    return None


def _of_two(
    found: NDArray,
    parameters: Mapping[str, NDArray],
    ways: Mapping[str, Callable[[NDArray, NDArray], NDArray]],
) -> str | None:
    """Returns the bug that has another parameter of the same shape in the place of one."""
    # One of several lone numbers is some factor of another.
    telling = [each for each in _telling(found, parameters) if each[1].size > 1]
    for name, parameter, each in telling:
        # The numbers of one head are the same, or no parameter of heads explains them.
        of_head = found.reshape(-1, each)[:, 0]
        if not is_same(np.repeat(of_head, each), found):
            continue
        others = [(other, theirs) for other, theirs, _ in telling if other != name and theirs.size == parameter.size]
        for label, way in ways.items() if others else ():
            wanted = way(parameter, of_head)
            far = np.linalg.norm(np.stack([theirs for _, theirs in others]) - wanted, axis=1)
            nearest = int(far.argmin())
            if far[nearest] <= SAME * np.linalg.norm(wanted):
                return label.format(others[nearest][0], name)
    return None
