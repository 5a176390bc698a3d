"""Traces of one forward pass, and the taps that make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import TruncatedError

T = TypeVar("T")
Trace = dict[str, NDArray]
# Called with each site's name and value; what it returns takes the value's place. Recording, replacing and perturbing
# are taps. Without a tap is not the same as with one that changes nothing: a model may then take another path.
Tap = Callable[[str, Any], Any]
# (parameters, inputs, tap) -> output (B, ..., width), in jax. Parameters and inputs are any trees.
TappedForward = Callable[[Any, Any, Tap], jax.Array]
# The same, which runs without a tap, too.
Forward = Callable[[Any, Any, Tap | None], jax.Array]
# Told what is being done next, in a few words.
Progress = Callable[[str], None]


def silent(step: str) -> None:
    """The progress that nobody watches."""


def passing(site: str, value: Any) -> Any:
    """The tap that changes nothing."""
    return value


def recorder(forward: TappedForward) -> Callable[[Any, Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    """A function from parameters, inputs and replacements by site to every site's value, before it is replaced."""

    def run(parameters: Any, inputs: Any, replace: dict[str, jax.Array]) -> dict[str, jax.Array]:
        recorded: dict[str, jax.Array] = {}

        def tap(site: str, value: jax.Array) -> jax.Array:
            recorded[site] = value
            return replace[site].astype(value.dtype) if site in replace else value

        forward(parameters, inputs, tap)
        return recorded

    return run


def replacements(replace: Mapping[str, NDArray] | None, dtype: DTypeLike) -> dict[str, jax.Array]:
    """Values by site for `recorder`, wide enough for a token stream that is wider than `dtype`."""
    wide = np.promote_types(dtype, np.float32)
    return {site: jnp.asarray(value, wide) for site, value in (replace or {}).items()}


def narrowed(parameters: T, dtype: DTypeLike) -> T:
    """A tree of parameters, below float64 with float32 for float64, which jax would make of them with a warning."""
    narrow = np.dtype(dtype) != np.float64
    return jax.tree.map(lambda x: x.astype(np.float32) if narrow and x.dtype == np.float64 else x, parameters)


def beside(work: Callable[..., T], *arguments: Any) -> Future[T]:
    """Work in a thread of its own, for what leaves Python's lock alone: XLA's compiler, NumPy's products."""
    thread = ThreadPoolExecutor(1)
    future = thread.submit(work, *arguments)
    thread.shutdown(wait=False)
    return future


def require_float64(trace: Mapping[str, NDArray], name: str) -> None:
    """Raises `TruncatedError` where a trace that was to be float64 is not, as when jax silently makes it float32."""
    wrong = {site: value.dtype for site, value in trace.items() if value.dtype != np.float64}
    if wrong:
        site, found = next(iter(wrong.items()))
        raise TruncatedError(
            f"{name} was to compute in float64, but {len(wrong)} of {len(trace)} sites are not, first {site}: {found}:"
            " build it in the dtype that load(checkpoint, dtype) is told, and cast nothing to another"
        )


def widened(trace: Mapping[str, NDArray], name: str) -> Trace:
    """A candidate's trace that was to be float64: what of it is not is taken as it is, and wrong by its rounding.

    Raises:
      TruncatedError: nothing of it is float64, so that it was not asked in a way that it understands.
    """
    if all(value.dtype != np.float64 for value in trace.values()):
        require_float64(trace, name)
    return {site: np.asarray(value, np.float64) for site, value in trace.items()}
