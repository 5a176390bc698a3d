"""Rounds values to formats: those in which values are stored, and those that matrix units multiply."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


def _to(dtype: type) -> Callable[[NDArray], NDArray]:
    return lambda x: x.astype(dtype).astype(x.dtype)


def _tf32(x: NDArray) -> NDArray:
    """Rounds to ten bits of mantissa, as NVIDIA's matrix units do to float32 operands by default."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


# Formats in which values are stored, the coarsest first: a value that is exact in bfloat16 is exact in float32, too.
STORED: dict[str, Callable[[NDArray], NDArray]] = {
    "bfloat16": _to(ml_dtypes.bfloat16),
    "float16": _to(np.float16),
    "float32": _to(np.float32),
}
# One unit of rounding of each format.
UNIT = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}
# Formats that matrix units multiply. TF32 and float16 have the same ten bits of mantissa.
MULTIPLIED: dict[str, Callable[[NDArray], NDArray]] = {
    "bfloat16": _to(ml_dtypes.bfloat16),
    "ten bits of mantissa (TF32, float16)": _tf32,
}
