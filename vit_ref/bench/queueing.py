"""How many passes are given to the device before it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def passes_at_once() -> int:
    """One on a CPU; eight on an accelerator, which works at one while the host prepares the next.

    So does training, which waits for no step. With one at a time an H200 stood still for 5 of 44 ms of a step.
    """
    return 1 if jax.default_backend() == "cpu" else 8


def queue_passes(
    launch: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: jax.block_until_ready(result)
) -> Callable[..., Any]:
    """A function `(times=1)` that launches so often, waits until the device is done, and returns the last result.

    Args:
      launch: returns arrays that the device may still be at; one launch's are done when the next one's are.
      wait: given the last result, returns it when the device is done.
    """

    def run(times: int = 1) -> Any:
        for _ in range(times):
            result = launch()
        return wait(result)

    return run
