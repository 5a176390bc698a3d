"""Recognises an activation, also in a gated unit, and predicts what another one would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import special

from vit_ref.verify.diagnose.predictions import Prediction, is_same

ACTIVATIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "erf GELU": lambda x: x * special.ndtr(x),
    "tanh GELU": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick GELU": lambda x: x * special.expit(1.702 * x),
    "SiLU": lambda x: x * special.expit(x),
    "ReLU": lambda x: np.maximum(x, 0),
    "squared ReLU": lambda x: np.square(np.maximum(x, 0)),
    "leaky ReLU of slope 0.01": lambda x: np.where(x > 0, x, 0.01 * x),
    "leaky ReLU of slope 0.1": lambda x: np.where(x > 0, x, 0.1 * x),
    "leaky ReLU of slope 0.2": lambda x: np.where(x > 0, x, 0.2 * x),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "softplus": lambda x: np.logaddexp(x, 0),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "no activation": lambda x: x,
}


def activate_otherwise(truth: NDArray, x: NDArray) -> Iterator[Prediction]:
    """Yields what other activations give, if the right value is the activation of the value before it.

    Args:
      truth: the right value.
      x: the value before it.
    """
    right = next((name for name, f in ACTIVATIONS.items() if is_same(f(x), truth)), None)
    for name, f in ACTIVATIONS.items() if right and right != "no activation" else ():
        if name != right:
            yield Prediction(f"{name} for {right}", f(x))


def gate_otherwise(truth: NDArray, site: str, one: NDArray, other: NDArray) -> Iterator[Prediction]:
    """Yields bugs of a gated unit, which is the activation of one half times the other half.

    Args:
      truth: the right value.
      site: the name of the value that the halves come from, or of both values.
      one: one half.
      other: the other half.
    """
    for gate, up, swapped in ((one, other, "first"), (other, one, "second")):
        right = next((name for name, f in ACTIVATIONS.items() if is_same(f(gate) * up, truth)), None)
        for name, f in ACTIVATIONS.items() if right else ():
            if name != right:
                yield Prediction(f"{name} for {right} in the gate", f(gate) * up)
            else:
                yield Prediction(f"the {swapped} half of {site} gated by the other", f(up) * gate)
