"""The most that the device's matrix products reach in one run: what a model's speed is measured against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_ref.bench.queueing import passes_at_once, queue_passes
from vit_ref.verify.precision import Precision

# Square products of these sides, the best of which counts: a small one does not fill an accelerator, and one of 8192
# takes ten seconds on two cores. There, 1536 was the fastest of 512 to 3072.
_SIDES = {"cpu": (1024, 1536)}
_ACCELERATOR = (4096, 8192)


class Roofline:
    """Large matrix products, as many at once as of what is measured against them, and timed in turns with it.

    Where a machine's speed changes within minutes, one that is measured once is soon too low or too high: models were
    seen to reach 118 % of it.

    Args:
      precision: what they are asked for in.
    """

    def __init__(self, precision: Precision):
        sides = _SIDES.get(jax.default_backend(), _ACCELERATOR)
        with precision.active():
            self._products = {side: _product(side, precision.dtype) for side in sides}
        self._seconds: dict[int, list[float]] = {side: [] for side in sides}

    def measure(self) -> None:
        """Times each product once more."""
        times = passes_at_once()
        for side, run in self._products.items():
            run()  # Not timed: right after a train step it took up to twice as long.
            start = time.perf_counter()
            run(times)
            self._seconds[side].append((time.perf_counter() - start) / times)

    def flops(self) -> float:
        """Operations a second: the median of each side, the best side.

        The median, as of what is compared with it: a machine's best moment is nothing that a model could keep up.
        """
        return max(2 * side**3 / statistics.median(seconds) for side, seconds in self._seconds.items())


def _product(side: int, dtype: DTypeLike) -> Callable[..., Any]:
    """One product, compiled, as `queue_passes` has it."""
    values = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    x = jax.device_put(jnp.asarray(values, dtype))
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    return queue_passes(lambda: multiply(x, x))
