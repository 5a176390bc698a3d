"""The formats that values are rounded to: those that they are stored in, and those that matrix units multiply."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


def _to(dtype: type) -> Callable[[NDArray], NDArray]:
    return lambda x: x.astype(dtype).astype(x.dtype)


def _tf32(x: NDArray) -> NDArray:
    """The ten bits of mantissa with which NVIDIA's matrix units multiply float32 by default."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


# What values are stored in, the coarsest first: what is exact in bfloat16 is so in float32.
STORED: dict[str, Callable[[NDArray], NDArray]] = {
    "bfloat16": _to(ml_dtypes.bfloat16),
    "float16": _to(np.float16),
    "float32": _to(np.float32),
}
# One unit of rounding of each.
UNIT = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}
# What matrix units multiply. TF32 and float16 have the same ten bits.
MULTIPLIED: dict[str, Callable[[NDArray], NDArray]] = {
    "bfloat16": _to(ml_dtypes.bfloat16),
    "ten bits of mantissa (TF32, float16)": _tf32,
}
