"""Checks of a reference that is the only truth."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, UnjudgedError
from vit_ref.verify.gates import SEMANTIC_RMS, against, error

# Implementations of attention in transformers that need no other package.
_ATTENTION = ("eager", "sdpa")


def require_same_attention(name: str, loaded: Any, output: NDArray, run: Callable[[Any], NDArray]) -> str:
    """Checks that a model from transformers gives the same float64 output with eager and with fused attention.

    Args:
      name: the reference's name.
      loaded: the model that its loader returned.
      output: its float64 output.
      run: returns the float64 output of such a model.

    Returns:
      The note for the report; "" if the model has only one implementation.

    Raises:
      UnjudgedError: the two differ.
    """
    config = getattr(loaded, "config", None)
    own = getattr(config, "_attn_implementation", None)
    if own not in _ATTENTION or not hasattr(loaded, "set_attn_implementation"):
        return ""
    other = next(name for name in _ATTENTION if name != own)
    changed = copy.deepcopy(loaded)
    try:
        changed.set_attn_implementation(other)
    except (ValueError, ImportError):
        return ""
    if getattr(changed.config, "_attn_implementation", None) != other:
        return ""
    off = error(run(changed), output)
    if not off.passes_semantic_gate:
        raise UnjudgedError(
            f"{name}: its {own} and its {other} attention differ in float64 at {{place}} by"
            f" {against(off.rms, SEMANTIC_RMS)}: one of the two is wrong, and it cannot decide: leave masked rows out"
            " with output=, or give Reference(attention=False)",
            "output",
        )
    return f"the reference's {own} and {other} attention agree in float64 to {off.rms:.0e}"


def require_same_weights(
    name: str, exact: Mapping[str, NDArray], rounded: Mapping[str, NDArray], to: DTypeLike
) -> None:
    """Checks that a reference has the same weights whenever it is loaded.

    Otherwise its error in the tested precision is that of other weights, and so large that it allows any candidate.
    Random weights differ between dtypes, even from the same seed.

    Args:
      name: the reference's.
      exact: its parameters, loaded in float64.
      rounded: its parameters, loaded in the tested precision.
      to: the dtype of that precision.

    Raises:
      CandidateError: they differ by more than rounding.
    """
    limits = ml_dtypes.finfo(to)
    for path, value in exact.items():
        found = rounded.get(path)
        off = np.inf if found is None or found.shape != value.shape else _root_mean_square(found - value)
        # `not off <=` instead of `off >`, so that NaN is refused too.
        if not off <= 8 * float(limits.eps) * _root_mean_square(value) + float(limits.smallest_subnormal):
            raise CandidateError(
                f"{name}: load() gives other weights in {limits.dtype} than in float64, first at {path!r}: draw them in"
                " one dtype and from one seed, or read them from a file"
            )


def _root_mean_square(value: NDArray) -> float:
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))) if value.size else 0.0


def digest_of(parameters: Mapping[str, NDArray]) -> str:
    """Returns a digest of parameters by name."""
    digest = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def require_unchanged(candidate: str, before: tuple[str, NDArray], now: tuple[str, NDArray]) -> None:
    """Checks that a candidate left the reference as it was.

    Args:
      candidate: the candidate's name.
      before: the digest of the reference's parameters, and its output, before the candidate was loaded.
      now: the same after the candidate was loaded and run.

    Raises:
      CandidateError: they differ.
    """
    if now[0] == before[0] and np.array_equal(now[1], before[1], equal_nan=True):
        return
    if now[0] != before[0] or not error(now[1], before[1]).passes_semantic_gate:
        raise CandidateError(
            f"{candidate}: it changes the reference, {'its output' if now[0] == before[0] else 'its parameters'}: copy"
            " what load() takes from it, and replace nothing in a library that both use"
        )


def note_constants(loaded: Any) -> str:
    """Returns the report's note on constants that a PyTorch model computed when it was made; "" if it has none.

    The model rounded them then, and widening does not undo that. So a candidate must hold the same numbers.

    Args:
      loaded: the model that the reference's loader returned.
    """
    if not hasattr(loaded, "named_buffers"):
        return ""
    saved = loaded.state_dict().keys()
    names = [name for name, buffer in loaded.named_buffers() if buffer.is_floating_point() and name not in saved]
    if not names:
        return ""
    more = ", ..." if len(names) > 3 else ""
    return f"constants that the reference computed when it was made are part of the truth: {', '.join(names[:3])}{more}"


def require_same_parts(candidate: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    """Checks that both sides joined their several outputs in the same order.

    Args:
      candidate: the candidate's name.
      ours: the names of its outputs; none for one array or a tuple.
      theirs: the names of the reference's.

    Raises:
      CandidateError: they differ.
    """
    if ours != theirs:
        said = (", ".join(names) if names else "values without names" for names in (ours, theirs))
        raise CandidateError(
            f"{candidate}: its output= returns {next(said)}, and the reference's returns {next(said)}: return mappings"
            " with the same names, or tuples in the same order"
        )
