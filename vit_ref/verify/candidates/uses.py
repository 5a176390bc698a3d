"""Finds, in a pass that jax traced, the values that are used in one place only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Literal

# Operations that only move elements or change their dtype. What goes past before one goes past after it.
_MOVES = {"reshape", "transpose", "convert_element_type", "squeeze", "broadcast_in_dim", "copy"}

# Marks a value with its site. Later operations have to use the marked value.
mark = checkpoint_name


def find_used_once(traced: ClosedJaxpr) -> Set[str]:
    """Returns the sites whose values are used by nothing but their mark.

    Args:
      traced: the pass, with values marked by `mark`.
    """
    jaxpr = traced.jaxpr
    used = [var for equation in jaxpr.eqns for var in equation.invars] + list(jaxpr.outvars)
    uses = Counter(var for var in used if not isinstance(var, Literal))
    made: dict[Any, Any] = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    found, passed = set[str](), set[str]()
    for equation in jaxpr.eqns:
        if equation.primitive.name != "name":
            continue
        site, (var,) = equation.params["name"], equation.invars
        while uses[var] == 1 and var in made and made[var].primitive.name in _MOVES:
            var = made[var].invars[0]
        (found if uses[var] == 1 else passed).add(site)
    return found - passed
