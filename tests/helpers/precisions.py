"""The precision of a dtype, as tests of the model and of the references compute in it."""

from __future__ import annotations

import numpy as np
from jax.typing import DTypeLike

from vit_ref.verify.precision import FLOAT64, Precision


def precision_of(dtype: DTypeLike) -> Precision:
    """The precision that computes in a dtype, float64 too, from parameters as they are and with the device's products.

    `resolve_precision` returns those that a numerical gate is asked for.
    """
    dtype = np.dtype(dtype)
    return FLOAT64 if dtype == np.float64 else Precision(dtype.name, dtype)
