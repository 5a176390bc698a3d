"""The number of passes that go to the device before the host waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def passes_at_once() -> int:
    """Returns 1 on a CPU, and 8 on an accelerator, which computes one pass while the host prepares the next.

    Training does the same, because it does not wait for each step. With one pass at a time an accelerator would idle.
    """
    return 1 if jax.default_backend() == "cpu" else 8


def queue_passes(
    launch: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: jax.block_until_ready(result)
) -> Callable[..., Any]:
    """Returns a function `(times=1)` that launches that many passes, waits for the device, and returns the last result.

    Args:
      launch: returns arrays that the device may still be computing. The device finishes launches in order.
      wait: takes the last result, and returns it when the device has finished.
    """

    def run(times: int = 1) -> Any:
        for _ in range(times):
            result = launch()
        return wait(result)

    return run
