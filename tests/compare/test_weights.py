"""Is a kernel that the candidate turned the wrong way named?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
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
    report = vit_ref.compare(convolved.reference(), convolved.candidate(change, sites), backward=False, fail_fast=True)
    assert report.forward.semantic_failures[0].site == ("block.1" if "pair.last" in sites else "head")
    assert [cause.label for cause in report.forward.causes] == ([label] if label else [])


def test_a_wrong_order_is_named_if_the_reference_loads_in_each_dtype() -> None:
    made = convolved.reference()
    ready = dataclasses.replace(
        made, load=lambda checkpoint, dtype: made.load(checkpoint).to(getattr(convolved.torch, np.dtype(dtype).name))
    )
    report = vit_ref.compare(
        ready, convolved.candidate(lambda weight: weight.flip(2, 3), SITES), backward=False, fail_fast=True
    )
    assert [cause.label for cause in report.forward.causes] == ["block.1.weight flipped"]


def test_a_kernel_turned_around_for_a_transposed_convolution_is_matched() -> None:
    theirs = np.random.default_rng(0).normal(size=(4, 5, 2, 3))
    ours = theirs.transpose(2, 3, 0, 1)[::-1, ::-1]
    move = find_move(ours, theirs)
    assert move is not None and np.array_equal(move(ours), theirs)
    assert find_move(ours[::-1, :, ::-1], theirs) is None


class Layers(convolved.torch.nn.Module):
    """Linear layers, some of which have the same shape."""

    def __init__(self) -> None:
        super().__init__()
        linear = convolved.torch.nn.Linear
        self.query, self.key, self.wide = linear(4, 3), linear(4, 3), linear(4, 5)
        self.joined, self.first, self.second = linear(11, 6), linear(6, 6), linear(6, 6)

    def forward(self, x: Any) -> Any:
        parts = [self.query(x), self.key(x), self.wide(x)]
        return self.second(self.first(self.joined(convolved.torch.cat(parts, -1))))


def of_layers() -> vit_ref.Reference:
    def load(checkpoint: Any) -> Any:
        convolved.torch.manual_seed(0)
        return Layers().eval()

    return vit_ref.Reference(
        load=load, inputs=lambda seed: {"x": np.random.default_rng(seed).normal(size=(2, 7, 4))}, name="layers"
    )


def candidate_of_layers(**wrong: str) -> vit_ref.Candidate:
    """Declares the same layers in jax.

    Args:
      wrong: for a parameter or a layer, another one whose values it takes; for "order", the order of the parts.
    """
    names = {end: end for end in wrong.get("order", "query key wide").split()}
    moved = {name: other for name, other in wrong.items() if name != "order"}

    def forward(w: Any, x: Any, tap: Any = lambda name, value: value) -> Any:
        def linear(name: str, x: Any) -> Any:
            layer = moved.get(name, name)
            weight, bias = (f"{moved.get(f'{name}_{end}', layer)}.{end}" for end in ("weight", "bias"))
            return tap(name, x @ w[weight].T + w[bias])

        parts = {name: linear(name, x) for name in ("query", "key", "wide")}
        joined = linear("joined", jnp.concatenate([parts[name] for name in names], axis=-1))
        return linear("second", linear("first", joined))

    def load(checkpoint: Any, reference: Any) -> Any:
        return forward, {name: value.detach().numpy() for name, value in reference.state_dict().items()}

    return vit_ref.Candidate(load=load, name="jax")


@pytest.mark.parametrize(
    ("wrong", "site", "label"),
    [
        ({"query": "key"}, "query", "the value of key in its place"),
        ({"first": "second"}, "first", "the parameters of second in place of first's"),
        ({"first_weight": "second"}, "first", "the weight of second in place of first's"),
        ({"first_bias": "second"}, "first", "second.bias added, not first.bias"),
        (
            {"order": "wide query key"},
            "joined",
            "joined.weight applied to inputs whose last 5 channels stand first, as if concatenated in another order",
        ),
        (
            {"order": "key wide query"},
            "joined",
            "joined.weight applied to inputs whose first 3 channels stand last, as if concatenated in another order",
        ),
        ({"order": "wide key query"}, "joined", None),
        ({}, "", None),
    ],
)
def test_weights_of_another_layer_and_another_order_of_inputs_are_named(
    wrong: dict[str, str], site: str, label: str | None
) -> None:
    report = vit_ref.compare(of_layers(), candidate_of_layers(**wrong), backward=False, fail_fast=True)
    assert [failure.site for failure in report.forward.semantic_failures[:1]] == ([site] if site else [])
    assert [cause.label for cause in report.forward.causes] == ([label] if label else [])
