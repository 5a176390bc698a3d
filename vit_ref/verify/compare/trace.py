"""Traces of one forward pass, and the taps that make them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import InputError, TruncatedError

T = TypeVar("T")
Trace = dict[str, NDArray]
# It is called with each site's name and value, and returns the value to use in its place. Recording, replacing and
# perturbing are taps. Without a tap a model may take another path than with one that changes nothing.
Tap = Callable[[str, Any], Any]
# (parameters, inputs, tap) -> output (B, ..., width), in jax. Parameters and inputs may be any trees.
TappedForward = Callable[[Any, Any, Tap], jax.Array]
# The same, but the tap may be None.
Forward = Callable[[Any, Any, Tap | None], jax.Array]
# It gets a description of each next step, in a few words.
Progress = Callable[[str], None]


def silent(step: str) -> None:
    """Reports no progress."""


def passing(site: str, value: Any) -> Any:
    """Returns the value unchanged. This is the tap that changes nothing."""
    return value


def recorder(forward: TappedForward) -> Callable[[Any, Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Returns a function that records every site's value before it is replaced.

    Args:
      forward: the forward pass.

    Returns:
      A function of parameters, inputs and replacements by site. It returns the values by site.
    """

    def run(parameters: Any, inputs: Any, replace: dict[str, jax.Array]) -> dict[str, jax.Array]:
        recorded: dict[str, jax.Array] = {}

        def tap(site: str, value: jax.Array) -> jax.Array:
            recorded[site] = value
            return replace[site].astype(value.dtype) if site in replace else value

        forward(parameters, inputs, tap)
        return recorded

    return run


def replacements(replace: Mapping[str, NDArray] | None, dtype: DTypeLike) -> dict[str, jax.Array]:
    """Returns replacements for `recorder`, in at least float32, because a token stream may be wider than `dtype`.

    Args:
      replace: values by site.
      dtype: the dtype of the computation.
    """
    wide = np.promote_types(dtype, np.float32)
    return {site: jnp.asarray(value, wide) for site, value in (replace or {}).items()}


def narrowed(parameters: T, dtype: DTypeLike) -> T:
    """Returns parameters without float64, unless that is the dtype. jax would narrow them itself, with a warning.

    Args:
      parameters: any tree.
      dtype: the dtype of the computation.
    """
    narrow = np.dtype(dtype) != np.float64
    return jax.tree.map(lambda x: x.astype(np.float32) if narrow and x.dtype == np.float64 else x, parameters)


# More compilers than cores would all end late, and each takes memory. So the first one that is needed ends first.
_THREADS = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="vit_ref")


def beside(work: Callable[..., T], *arguments: Any) -> Future[T]:
    """Starts work in another thread. It helps if the work releases Python's lock, as XLA's compiler and NumPy do.

    Args:
      work: the function to call. It must not wait for other work of this kind.
      *arguments: its arguments.
    """
    return _THREADS.submit(work, *arguments)


def require_float64(trace: Mapping[str, NDArray], name: str) -> None:
    """Checks that every value of a trace is float64, because jax may silently make it float32.

    Args:
      trace: values by site.
      name: the name of the implementation.

    Raises:
      TruncatedError: a value is a float of another dtype.
      InputError: a value is no float.
    """
    wrong = {site: value.dtype for site, value in trace.items() if value.dtype != np.float64}
    if wrong:
        require_floats(trace, name)
        site, found = next(iter(wrong.items()))
        raise TruncatedError(
            f"{name} must compute in float64, but {len(wrong)} of {len(trace)} sites do not, first {site}: {found}:"
            " build it in the dtype that load(checkpoint, dtype) gets, and cast nothing to another"
        )


def require_floats(trace: Mapping[str, NDArray], name: str) -> None:
    """Raises `InputError` if a value of a trace has no rounding to compare, because it is an integer or a boolean."""
    for site, value in trace.items():
        if value.dtype.kind in "iub":
            raise InputError(
                f"{name}: {site} has dtype {value.dtype}, and only floats can be compared: let output= pick floats,"
                " such as the scores that an index was taken from, or leave that site out"
            )


def widened(trace: Mapping[str, NDArray], name: str) -> Trace:
    """Returns a candidate's trace in float64. A value of another dtype is widened, and its rounding counts as an error.

    Args:
      trace: the candidate's values by site, computed for float64.
      name: the candidate's name.

    Raises:
      TruncatedError: no value is float64, so the candidate did not follow the dtype.
    """
    if all(value.dtype != np.float64 for value in trace.values()):
        require_float64(trace, name)
    return {site: np.asarray(value, np.float64) for site, value in trace.items()}
