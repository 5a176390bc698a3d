"""What a port has to do besides computing the right values: the same each time, for each image, compiled or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.trace import Progress, silent

BEHAVIOURS = ("repeat", "batch", "jit", "inputs")


class Runnable(Protocol):
    """A port of which only the output is asked."""

    name: str

    def outputs(self, batches: Sequence[NDArray], dtype: DTypeLike, *, jit: bool = True) -> list[NDArray]:
        """Outputs of several batches of images, compiled where `jit` says so and the port is one of jax."""
        ...


class Behaviour(NamedTuple):
    """One property of a port.

    Attributes:
      name: one of `BEHAVIOURS`.
      error: relative RMS between what must be equal, in float64; None where it could not be measured.
      reason: what it means, where the property fails; "" where it holds.
    """

    name: str
    error: float | None
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the property holds."""
        return not self.reason


def check_behaviour(port: Runnable, pixels: NDArray, *, progress: Progress = silent) -> tuple[Behaviour, ...]:
    """Runs a port in float64 in ways that must all agree to within the semantic gate.

    Args:
      port: the port.
      pixels: float32 images (B, height, width, C), two of them at least for "batch" to mean anything.
      progress: told what is being done next.
    """
    progress(f"{port.name}: the same each time, alone, compiled")
    given = pixels.copy()
    first, last = given[:1], given[-1:]
    try:
        together, again, *alone = port.outputs([given, given, first, last], np.float64)
        compiled = _behaviour("jit", together, port.outputs([given], np.float64, jit=False)[0], _JIT)
    except jax.errors.JAXTypeError as error:
        reason = f"jax cannot trace it ({type(error).__name__}), so nothing can compile or differentiate it"
        compiled = Behaviour("jit", None, reason)
        together, again, *alone = port.outputs([given, given, first, last], np.float64, jit=False)
    ends = np.concatenate([together[:1], together[-1:]])
    changed = "" if np.array_equal(given, pixels) else "it writes into the images that it is given: it has to copy them"
    return (
        _behaviour("repeat", together, again, _REPEAT),
        _behaviour("batch", ends, np.concatenate(alone), "an image alone comes out otherwise than in its batch"),
        compiled,
        Behaviour("inputs", None, changed),
    )


_REPEAT = "two runs on the same images differ: is dropout live? load it in evaluation mode"
_JIT = "compiled it computes something else than operation by operation"


def _behaviour(name: str, expected: NDArray, found: NDArray, reason: str) -> Behaviour:
    apart = error(found, expected).rms
    return Behaviour(name, apart, reason if apart > SEMANTIC_RMS else "")
