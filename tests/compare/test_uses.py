"""Is a value recognised that only one part of a pass uses?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vit_ref.verify.candidates import uses

# What becomes of the value x and of its mark, and whether nothing but the mark uses x.
PASSES = {
    "a value that enters one part": (lambda x, mark: mark(x * 2) + 1, True),
    "a value that also goes past it": (lambda x, mark: (y := x * 2, mark(y) + y)[1], False),
    "a reshaped value": (lambda x, mark: mark((x * 2).reshape(3, 2)) + 1, True),
    "a value that goes past before its reshape": (
        lambda x, mark: (y := x * 2, mark(y.reshape(3, 2)) + y.reshape(3, 2))[1],
        False,
    ),
}
each = pytest.mark.parametrize(("run", "alone"), PASSES.values(), ids=PASSES)


@each
def test_of_jax(run: Callable[..., Any], alone: bool) -> None:
    traced = jax.make_jaxpr(lambda x: run(x, lambda value: uses.mark(value, "site")))(jnp.ones((2, 3)))
    assert uses.find_used_once(traced) == ({"site"} if alone else set())


@pytest.mark.torch
@each
def test_of_pytorch(run: Callable[..., Any], alone: bool) -> None:
    torch = pytest.importorskip("torch")
    from vit_ref.verify.candidates import torch_uses

    marked = {}

    def mark(value: Any) -> Any:
        marked["site"] = (value.grad_fn, value.output_nr)
        return value.view_as(value)

    output = run(torch.ones(2, 3, requires_grad=True), mark)
    assert torch_uses.find_used_once(output, marked) == ({"site"} if alone else set())
