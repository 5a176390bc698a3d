"""The most that the device's matrix products reach in one run: what a model's speed is measured against."""

from __future__ import annotations

import statistics
import time
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_ref.verify.precision import Precision

# Square products of these sides, the best of which counts: a small one does not fill an accelerator, and one of 8192
# takes ten seconds on two cores.
_SIDES = {"cpu": (1024, 2048)}
_ACCELERATOR = (4096, 8192)
_ROUNDS = 7


@cache
def matmul_flops(precision: Precision) -> float:
    """Operations a second of a large matrix product: the median of each side, the best side; measured once a process.

    The median, as of what is compared with it: a machine's best moment is nothing that a model could keep up.
    """
    with precision.asked():
        return max(_measured(side, precision.dtype) for side in _SIDES.get(jax.default_backend(), _ACCELERATOR))


def _measured(side: int, dtype: DTypeLike) -> float:
    values = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    x = jax.device_put(jnp.asarray(values, dtype))
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(multiply(x, x))
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)
