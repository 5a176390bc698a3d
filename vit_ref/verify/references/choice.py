"""The references by name, and the packages that each needs."""

from __future__ import annotations

import importlib
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
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.references.flax_vit import FlaxViTReference, require_flaxvit
from vit_ref.verify.references.numpy_oracle import NumpyOracle, whole
from vit_ref.verify.references.torch_vit import TorchViTReference, require_torch
from vit_ref.verify.rounding import MULTIPLIED

_OPERANDS: dict[str, Callable[[NDArray], NDArray]] = {
    "float32": whole,
    "tensorfloat32": MULTIPLIED["ten bits of mantissa (TF32, float16)"],
    "bfloat16": MULTIPLIED["bfloat16"],
}


class NumpyReference(NumpyOracle):
    """The NumPy oracle as a reference. It has no backward pass, and rounds its products as this device does.

    Args:
      config: the model's configuration.
      tensors: see `NumpyOracle`.
      reason: why it replaces another reference; "" if it does not.
    """

    foreign = True

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray], reason: str = ""):
        super().__init__(config, tensors)
        self.reason = reason

    def operands(self, dtype: np.dtype) -> Callable[[NDArray], NDArray]:
        """Returns the function that rounds operands as jax does on this device now.

        A right candidate in TF32 errs a thousand times more than one with unrounded operands.

        Args:
          dtype: the dtype of the computation.
        """
        return _OPERANDS[products()] if dtype == np.float32 else super().operands(dtype)

    def trace(  # type: ignore[override]  # the oracle takes a dtype
        self, pixels: NDArray, precision: Precision = FLOAT64, replace: Mapping[str, NDArray] | None = None
    ) -> Trace:
        """Implements `Reference.trace`. Values in `replace` take the place of its own at those sites."""
        with precision.active():
            return super().trace(pixels, precision.dtype, replace)

    def storing(self, precision: Precision) -> NumpyReference:
        """Implements `Reference.storing`."""
        return NumpyReference(self.config, precision.rounded(self.tensors), self.reason)

    def gradients(self, pixels: NDArray, precision: Precision) -> Callable[[Objective], Gradients]:
        """Raises an error, because NumPy has no backward pass.

        Raises:
          UnsupportedByReferenceError: always.
        """
        if self.reason:
            raise UnsupportedByReferenceError(
                f"{self.reason}, and the NumPy oracle has no gradients: for gradients of whole models use the reference"
                " torch"
            )
        raise UnsupportedByReferenceError(
            "the NumPy oracle has no gradients: use the reference flax, or torch for whole models"
        )


class _Entry(NamedTuple):
    build: Callable[[ViTConfig, Mapping[str, NDArray]], Reference]
    require: Callable[[], None]
    module: str = ""


REFERENCES: dict[str, _Entry] = {
    "flax": _Entry(FlaxViTReference, require_flaxvit, "transformers.models.vit.modeling_flax_vit"),
    "torch": _Entry(TorchViTReference, require_torch, "transformers.models.vit.modeling_vit"),
    "numpy": _Entry(NumpyReference, lambda: None),
}


def import_module(name: str) -> None:
    """Imports the module of others that a reference runs, which happens otherwise when the reference is filled.

    Args:
      name: one of `REFERENCES`.
    """
    require(name)
    if module := REFERENCES[name].module:
        importlib.import_module(module)


def require(name: str) -> None:
    """Checks that the packages of a reference are installed.

    Args:
      name: one of `REFERENCES`.

    Raises:
      ReferenceUnavailableError: a package is missing; the message says what to install.
    """
    REFERENCES[name].require()


def with_fused_attention(reference: Reference) -> Reference:
    """Returns the same reference, but with fused attention in its backward pass and without probabilities.

    Args:
      reference: a reference of this package; see the module `fused`.
    """
    other: Any = copy(reference)
    other.fused = True
    return other


def reference_for(config: ViTConfig, tensors: Mapping[str, NDArray], name: str = "flax") -> Reference:
    """Returns a reference filled with a checkpoint's tensors.

    Args:
      config: the model's configuration.
      tensors: the tensors under Hugging Face's names and shapes, those of transformers 4.
      name: one of `REFERENCES`. The NumPy oracle replaces a reference that cannot express the configuration.

    Raises:
      ReferenceUnavailableError: the reference is not installed.
      InputError: no reference has that name, or the tensors do not fit it.
    """
    if name not in REFERENCES:
        raise InputError(f"reference is {name!r}: known are {', '.join(REFERENCES)}")
    try:
        return REFERENCES[name].build(config, tensors)
    except UnsupportedByReferenceError as error:
        return NumpyReference(config, tensors, reason=str(error))
