"""Traces, and what every implementation under observation offers: a trace of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import jax
import numpy as np
from numpy.typing import DTypeLike, NDArray

Trace = dict[str, NDArray]


class Implementation(Protocol):
    """A ViT that can be observed at the sites.

    Attributes:
      name: how reports call it.
    """

    name: str

    def trace(self, pixels: NDArray, dtype: DTypeLike) -> Trace:
        """Runs one forward pass in evaluation mode.

        Args:
          pixels: float32 images (B, height, width, C).
          dtype: dtype of the whole computation; parameters and pixels are converted to it exactly or by rounding once.

        Returns:
          Values by site, all of that dtype, in the order of the forward pass.
        """
        ...


@contextmanager
def precision_of(dtype: DTypeLike) -> Iterator[None]:
    """Lets jax compute in float64 where `dtype` is that, and only there; elsewhere it computes as users run it."""
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        yield


class TruncatedError(AssertionError):
    """A value that was asked for in one dtype came back in another: the oracle would be no oracle."""


def require_dtype(trace: Mapping[str, NDArray], dtype: DTypeLike, name: str) -> None:
    """Raises `TruncatedError` where a trace has a value of any other dtype, as when float64 is silently float32."""
    wrong = {site: value.dtype for site, value in trace.items() if value.dtype != np.dtype(dtype)}
    if wrong:
        site, found = next(iter(wrong.items()))
        raise TruncatedError(
            f"{name} was to compute in {np.dtype(dtype)}, but {len(wrong)} of {len(trace)} sites are not, first {site}:"
            f" {found}"
        )
