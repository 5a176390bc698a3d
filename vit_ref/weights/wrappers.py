"""Prefixes that training code puts before the name of every tensor, and the state that it saves beside the weights."""

from __future__ import annotations

from collections.abc import Iterable

# In this order: torch.compile and DataParallel; an attribute of a Lightning module; flax's own collection; flax's
# optimizers, old and new (google-research/vision_transformer and big_vision).
PREFIXES = ("_orig_mod.", "module.", "model.", "params/", "opt/target/", "optimizer/target/", "target/")
# First parts of the names of training state.
_STATE = frozenset({"opt", "opt_state", "optimizer", "state", "step", "rng", "extra", "chrono"})


def find_wrapper(names: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the prefix that all weights share, and the names of the weights.

    Args:
      names: names of all tensors in a checkpoint.

    Returns:
      The prefix, made of `PREFIXES`, or "", and the names that begin with it. The other names are training state.
    """
    prefix, weights = "", list(names)
    while inner := next((inner for inner in PREFIXES if _wraps(prefix + inner, prefix, weights)), None):
        prefix += inner
        weights = [name for name in weights if name.startswith(prefix)]
    return prefix, weights


def guess_wrapper(names: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the first of `PREFIXES` of more than half of the names, or "", and the names that do not have it."""
    names = list(names)
    for prefix in PREFIXES:
        others = [name for name in names if not name.startswith(prefix)]
        if 2 * len(others) < len(names):
            return prefix, others
    return "", names


def is_state(name: str) -> bool:
    """Tells whether a name belongs to training state, and not to a weight."""
    return name.split("/")[0] in _STATE


def _wraps(prefix: str, outer: str, names: list[str]) -> bool:
    inside = [name.startswith(prefix) for name in names]
    return any(inside) and all(
        within or is_state(name.removeprefix(outer)) for name, within in zip(names, inside, strict=True)
    )
