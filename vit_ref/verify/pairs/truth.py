"""Checks what can be checked of a reference that is the only truth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from vit_ref.errors import UnjudgedError
from vit_ref.verify.gates import SEMANTIC_RMS, against, error

# The implementations of attention that a model from transformers can be set to, and that have no requirements.
_ATTENTION = ("eager", "sdpa")


def require_same_attention(name: str, loaded: Any, run: Callable[[Any], NDArray]) -> str:
    """Runs a model from transformers with eager and with fused attention, which have to agree in float64.

    Args:
      name: the reference's.
      loaded: what its loader returned.
      run: the output in float64 of what a loader returned.

    Returns:
      What the report says; "" of a model that has one implementation only.

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
    off = error(run(changed), run(loaded))
    if not off.passes_semantic_gate:
        raise UnjudgedError(
            f"{name}: its {own} and its {other} attention differ in float64 at {{place}} by"
            f" {against(off.rms, SEMANTIC_RMS)}: one of the two is wrong, and it cannot decide: leave masked rows out"
            " with output=, or give Reference(attention=False)",
            "output",
        )
    return f"the reference's {own} and {other} attention agree in float64 to {off.rms:.0e}"


def note_constants(loaded: Any) -> str:
    """Returns what a report says of constants that a PyTorch model computed when it was made; "" without any.

    They were rounded then, and widening them does not undo it: a candidate has to hold the same numbers.
    """
    if not hasattr(loaded, "named_buffers"):
        return ""
    saved = loaded.state_dict().keys()
    names = [name for name, buffer in loaded.named_buffers() if buffer.is_floating_point() and name not in saved]
    if not names:
        return ""
    more = ", ..." if len(names) > 3 else ""
    return f"constants that the reference computed when it was made are part of the truth: {', '.join(names[:3])}{more}"
