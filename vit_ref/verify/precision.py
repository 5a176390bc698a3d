"""The precisions that the numerical gate judges, by name: what reference and candidate both are told to compute in.

The device's own habits are no part of them: where GPUs and TPUs round the operands of float32 products, a run in
"float32" asks for whole ones, of reference and candidate alike.
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


class Precision(NamedTuple):
    """What is computed in what.

    Attributes:
      name: how it is asked for and reported.
      dtype: of the computation; its row of `gates.ALLOWANCES` is the gate.
      stored: the dtype that the parameters are rounded to; None for that of the checkpoint, as a rule float32.
      products: `jax.default_matmul_precision`; None to leave it.
    """

    name: str
    dtype: np.dtype
    stored: np.dtype | None = None
    products: str | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, jax computes in this precision: in float64 where it is that, and only there.

        Products of float64 are whole ones, whatever jax_default_matmul_precision is: with "BF16_BF16_F32" a CPU makes
        them of bfloat16, and an oracle would err by 2e-3.

        Strictness about implicit promotion is lifted: the reference and flax's own layers rely on it, and what a
        candidate computes is compared here, not how it is written.
        """
        products = jax.default_matmul_precision(self.products) if self.products else nullcontext()
        promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        # Under JAX_DISABLE_JIT nothing can be compiled ahead.
        with (
            jax.enable_x64(self.dtype == np.float64),
            products,
            promotion[0],
            promotion[1],
            jax.disable_jit(False),
        ):
            yield

    def rounded(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """A checkpoint's tensors as they are stored."""
        return {
            name: tensor if self.stored is None or tensor.dtype.kind in "iub" else tensor.astype(self.stored)
            for name, tensor in tensors.items()
        }


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        # Whole products, which GPUs (TF32) and TPUs (bfloat16) do not make unless they are asked.
        Precision("float32", np.dtype(np.float32), products="float32"),
        # The same arrays; operands of products have ten bits of mantissa. The reference rounds likewise, so the row is
        # float32's: what is no product errs no more than there. A CPU has none, and `environment.notes` says so.
        Precision("tensorfloat32", np.dtype(np.float32), products="tensorfloat32"),
        # A model that was cast: parameters of eight bits. Their rounding is the checkpoint's loss and not the port's,
        # so the oracle takes the same ones, and the gate is no wider for it: 4.9e-3 is FlaxViT's error at the logits of
        # "rectangular", and 5.2e-3 under "mixed". Products of bfloat16 are exact everywhere, so they are left alone
        # here and below.
        Precision("bfloat16", _BFLOAT16, stored=_BFLOAT16),
        # What training uses: parameters stay float32, and the token stream, norms and softmax of this package's model.
        Precision("mixed", _BFLOAT16),
        # Likewise with float32 parameters: float16 is not asked for to save a model in.
        Precision("float16", np.dtype(np.float16)),
    )
}


# What formulas are compared in.
FLOAT64 = Precision("float64", np.dtype(np.float64), products="highest")


def resolve_precision(given: str | DTypeLike | Precision) -> Precision:
    """A precision by its name, or by the dtype of that name.

    Raises:
      InputError: there is none.
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
