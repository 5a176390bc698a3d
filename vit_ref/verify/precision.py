"""The precisions of the numerical gate, by name: what the reference and the candidate are both told to compute in.

The device's own habits are no part of them. GPUs and TPUs may round the operands of float32 products by default. A run
in "float32" asks for unrounded operands, from the reference and the candidate alike.

A new precision is one more line of `PRECISIONS`. Its dtype needs a row of `gates.ALLOWANCES`, and its name goes to the
choices of the commands and of pytest's plugin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import InputError

# Ten bits of mantissa.
_TF32_EPSILON = 2.0**-10


class Precision(NamedTuple):
    """The dtypes of one computation.

    Attributes:
      name: the precision's name in options and reports.
      dtype: dtype of the computation; its row of `gates.ALLOWANCES` is the gate.
      stored: dtype that the parameters are rounded to; None keeps the checkpoint's, usually float32.
      products: value of `jax.default_matmul_precision`; None leaves it as it is.
    """

    name: str
    dtype: np.dtype
    stored: np.dtype | None = None
    products: str | None = None

    @property
    def epsilon(self) -> float:
        """The relative spacing of the coarsest numbers that are multiplied."""
        return _TF32_EPSILON if self.products == "tensorfloat32" else float(ml_dtypes.finfo(self.dtype).eps)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes jax compute in this precision within the context. Float64 is enabled only for the precision float64.

        Float64 products keep all their digits, whatever jax_default_matmul_precision is. With "BF16_BF16_F32" a CPU
        would compute them from bfloat16, and the oracle would be wrong.

        Strict checks of implicit promotion are off within it. The reference and flax's own layers rely on promotion,
        and this suite compares what a candidate computes, not how it is written.
        """
        products = jax.default_matmul_precision(self.products) if self.products else nullcontext()
        promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        # Under JAX_DISABLE_JIT nothing could be compiled ahead of time.
        with (
            jax.enable_x64(self.dtype == np.float64),
            products,
            promotion[0],
            promotion[1],
            jax.disable_jit(False),
        ):
            yield

    def rounded(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Returns a checkpoint's tensors, rounded to the dtype that they are stored in.

        Args:
          tensors: arrays by name. Integers and booleans stay as they are.
        """
        return {
            name: tensor if self.stored is None or tensor.dtype.kind in "iub" else tensor.astype(self.stored)
            for name, tensor in tensors.items()
        }


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        # GPUs (TF32) and TPUs (bfloat16) round the operands unless they are told not to.
        Precision("float32", np.dtype(np.float32), products="float32"),
        # The same arrays, but operands of products have ten bits of mantissa. The reference rounds in the same way, so
        # the gate is float32's. A CPU has no such products, and `environment.notes` reports that.
        Precision("tensorfloat32", np.dtype(np.float32), products="tensorfloat32"),
        # A model that was cast: its parameters have eight bits. Their rounding is a loss of the checkpoint, not of the
        # candidate. So the oracle uses the same rounded parameters, and the gate is no wider for it. Products of
        # bfloat16 are exact on every device, so they are left alone here and below.
        Precision("bfloat16", _BFLOAT16, stored=_BFLOAT16),
        # The usual precision in training: parameters stay float32, and so do the token stream, norms and softmax of
        # this package's model.
        Precision("mixed", _BFLOAT16),
        # Parameters stay float32 here, too: float16 is not used to store models.
        Precision("float16", np.dtype(np.float16)),
    )
}


# The precision that tells how much float64 itself may lose.
FLOAT32 = PRECISIONS["float32"]
# The precision in which formulas are compared.
FLOAT64 = Precision("float64", np.dtype(np.float64), products="highest")


def resolve_precision(given: str | DTypeLike | Precision) -> Precision:
    """Returns a precision by its name, or by the dtype of that name.

    Args:
      given: a precision, a name in `PRECISIONS`, or a dtype.

    Raises:
      InputError: no precision has that name.
    """
    if isinstance(given, Precision):
        return given
    try:
        name = given if isinstance(given, str) and given in PRECISIONS else np.dtype(given).name
    except TypeError:
        name = str(given)
    if name not in PRECISIONS:
        raise InputError(f"precision is {name!r}: known are {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
