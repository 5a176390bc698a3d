"""Is a kernel that the candidate turned the wrong way named?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vit_ref
from vit_ref.verify.pairs.parameters import find_move

convolved = pytest.importorskip("tests.compare.convolved", reason="needs PyTorch: pip install 'vit-ref[torch]'")
pytestmark = pytest.mark.torch


def first(x: Any) -> Any:
    """Moves channels to the second axis."""
    return x.transpose(0, 3, 1, 2)


SITES = {"pair.first": ("block.0", first), "pair.last": ("block.1", first), "out": ("head", first)}


@pytest.mark.parametrize("sites", [SITES, {"out": SITES["out"]}], ids=["shown", "hidden"])
@pytest.mark.parametrize(
    ("change", "label"),
    [
        (lambda weight: weight.flip(2, 3), "block.1.weight flipped"),
        (lambda weight: weight.swapaxes(2, 3), "block.1.weight with its two spatial axes exchanged"),
        (lambda weight: weight.swapaxes(0, 1), "block.1.weight transposed"),
        (lambda weight: weight.roll(1, 2), None),
    ],
    ids=["flipped", "spatial", "transposed", "unknown"],
)
def test_a_wrong_order_of_a_kernel_is_named(change: Callable[[Any], Any], label: str | None, sites: Any) -> None:
    report = vit_ref.compare(convolved.reference(), convolved.candidate(change, sites), backward=False)
    assert report.forward.semantic_failures[0].site == ("block.1" if "pair.last" in sites else "head")
    assert [cause.label for cause in report.forward.causes] == ([label] if label else [])


def test_a_wrong_order_is_named_if_the_reference_loads_in_each_dtype() -> None:
    made = convolved.reference()
    ready = dataclasses.replace(
        made, load=lambda checkpoint, dtype: made.load(checkpoint).to(getattr(convolved.torch, np.dtype(dtype).name))
    )
    report = vit_ref.compare(ready, convolved.candidate(lambda weight: weight.flip(2, 3), SITES), backward=False)
    assert [cause.label for cause in report.forward.causes] == ["block.1.weight flipped"]


def test_a_kernel_turned_around_for_a_transposed_convolution_is_matched() -> None:
    theirs = np.random.default_rng(0).normal(size=(4, 5, 2, 3))
    ours = theirs.transpose(2, 3, 0, 1)[::-1, ::-1]
    move = find_move(ours, theirs)
    assert move is not None and np.array_equal(move(ours), theirs)
    assert find_move(ours[::-1, :, ::-1], theirs) is None
