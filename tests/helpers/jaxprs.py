"""The operations of a traced program, and their dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a program, with those of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from equations(getattr(inner, "jaxpr", inner))


def computed_in(jaxpr: Any, operations: set[str]) -> dict[str, set[np.dtype]]:
    """Returns operation -> floating dtypes of its inputs and outputs, for the operations that occur."""
    found: dict[str, set[np.dtype]] = {}
    for equation in equations(jaxpr):
        if equation.primitive.name in operations:
            values = (value.aval.dtype for value in (*equation.invars, *equation.outvars))
            floats = {dtype for dtype in values if jax.numpy.issubdtype(dtype, jax.numpy.floating)}
            found.setdefault(equation.primitive.name, set()).update(floats)
    return found
