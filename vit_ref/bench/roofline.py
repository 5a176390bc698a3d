"""The roofline of a model's speed: the best rate that the device's matrix products reach in the same run."""

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

# Sides of square products, the best of which counts. A small product does not fill an accelerator, and a large one
# takes
# too long on a CPU.
_SIDES = {"cpu": (1024, 1536)}
_ACCELERATOR = (4096, 8192)


class Roofline:
    """Rate of large matrix products, queued like the passes of a model, and measured in turns with them.

    The speed of a machine changes within minutes. A roofline that is measured only once would soon be too low or high.

    Args:
      precision: precision of the products.
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
            run()  # Not timed, because the first product after a training step is slow.
            start = time.perf_counter()
            run(times)
            self._seconds[side].append((time.perf_counter() - start) / times)

    def flops(self) -> float:
        """Returns operations a second: the median for each side, of the best side.

        Models are compared by their median too. A machine's best moment is no rate that a model could hold.
        """
        return max(2 * side**3 / statistics.median(seconds) for side, seconds in self._seconds.items())


def _product(side: int, dtype: DTypeLike) -> Callable[..., Any]:
    """Returns one compiled product, as a function from `queue_passes`."""
    values = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    x = jax.device_put(jnp.asarray(values, dtype))
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    return queue_passes(lambda: multiply(x, x))
