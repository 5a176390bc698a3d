"""The references by name, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import InputError, UnsupportedByReferenceError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.compare.objectives import Gradients, Objective
from vit_ref.verify.compare.protocols import Reference
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.environment import products
from vit_ref.verify.formats import MULTIPLIED
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.references.flax_vit import FlaxViTReference, require_flaxvit
from vit_ref.verify.references.numpy_oracle import NumpyOracle, whole
from vit_ref.verify.references.torch_vit import TorchViTReference, require_torch

_OPERANDS: dict[str, Callable[[NDArray], NDArray]] = {
    "float32": whole,
    "tensorfloat32": MULTIPLIED["ten bits of mantissa (TF32, float16)"],
    "bfloat16": MULTIPLIED["bfloat16"],
}


class NumpyReference(NumpyOracle):
    """The NumPy oracle as a reference. It goes forward only, and rounds its products as this device does.

    Args:
      config: the model's configuration.
      tensors: see `NumpyOracle`.
      reason: why it stands in for another reference, if it does.
    """

    foreign = True

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray], reason: str = ""):
        super().__init__(config, tensors)
        self.reason = reason

    def operands(self, dtype: np.dtype) -> Callable[[NDArray], NDArray]:
        """As jax rounds them here and now, for a candidate in jax.

        On a GPU that was asked for TF32, a right one errs a thousand times more than whole products would allow.
        """
        return _OPERANDS[products()] if dtype == np.float32 else super().operands(dtype)

    def trace(  # type: ignore[override]  # the oracle takes a dtype
        self, pixels: NDArray, precision: Precision = FLOAT64, replace: Mapping[str, NDArray] | None = None
    ) -> Trace:
        """See `Reference.trace`; values in `replace` take the place of its own at those sites."""
        with precision.active():
            return super().trace(pixels, precision.dtype, replace)

    def storing(self, precision: Precision) -> NumpyReference:
        """See `Reference.storing`."""
        return NumpyReference(self.config, precision.rounded(self.tensors), self.reason)

    def gradients(self, pixels: NDArray, precision: Precision) -> Callable[[Objective], Gradients]:
        """Raises `UnsupportedByReferenceError`."""
        if self.reason:
            raise UnsupportedByReferenceError(
                f"{self.reason}, and NumPy judges no gradients: the reference torch does, of whole models"
            )
        raise UnsupportedByReferenceError(
            "NumPy judges no gradients: the reference torch does, of whole models, and flax of what it can express"
        )


class _Entry(NamedTuple):
    build: Callable[[ViTConfig, Mapping[str, NDArray]], Reference]
    require: Callable[[], None]


REFERENCES: dict[str, _Entry] = {
    "flax": _Entry(FlaxViTReference, require_flaxvit),
    "torch": _Entry(TorchViTReference, require_torch),
    "numpy": _Entry(NumpyReference, lambda: None),
}


def require(name: str) -> None:
    """Raises `ReferenceUnavailableError`, saying what to install, where what a reference needs is not there."""
    REFERENCES[name].require()


def with_fused_attention(reference: Reference) -> Reference:
    """The same reference, whose gradients are those of fused attention, see `fused`, without probabilities."""
    other: Any = copy(reference)
    other.fused = True
    return other


def reference_for(config: ViTConfig, tensors: Mapping[str, NDArray], name: str = "flax") -> Reference:
    """A reference filled with a checkpoint's tensors.

    Args:
      config: the model's configuration.
      tensors: Hugging Face's names and shapes, those of transformers 4.
      name: one of `REFERENCES`. Where "flax" cannot express the configuration, NumPy stands in for it.

    Raises:
      ReferenceUnavailableError: it is not installed.
      InputError: there is no such reference, or the tensors do not fit it.
    """
    if name not in REFERENCES:
        raise InputError(f"reference is {name!r}: known are {', '.join(REFERENCES)}")
    try:
        return REFERENCES[name].build(config, tensors)
    except UnsupportedByReferenceError as error:
        return NumpyReference(config, tensors, reason=str(error))
