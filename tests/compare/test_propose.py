"""Does the command propose the table that a person would write?"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import vit_ref
from tests.compare import sides
from vit_ref.verify.pairs.proposal import propose

torch_side = pytest.importorskip("tests.compare.torch_side", reason="needs PyTorch: pip install 'vit-ref[torch]'")
convolved = pytest.importorskip("tests.compare.convolved", reason="needs PyTorch: pip install 'vit-ref[torch]'")
pytestmark = pytest.mark.torch


def test_the_proposed_table_is_the_one_that_a_person_would_write() -> None:
    proposal = propose(torch_side.reference(), dataclasses.replace(sides.in_nnx(), sites=None))
    assert {line.key: line.site for line in proposal.lines} == sides.NNX_SITES
    assert not proposal.unshown
    names: dict[str, object] = {}
    exec(str(proposal), names)
    judged = dataclasses.replace(sides.in_nnx(), sites=names["sites"])
    assert vit_ref.compare(torch_side.reference(), judged, backward=False).passed


def test_a_table_goes_past_a_wrong_value_and_says_where() -> None:
    proposal = propose(torch_side.reference(), sides.in_nnx(sides.tanh_gelu))
    assert {line.key: line.site for line in proposal.lines} == sides.NNX_SITES
    assert [line.site for line in proposal.lines if not line.equal] == ["blocks.{i}.act"]
    assert not proposal.unshown
    text = str(proposal)
    remark = "    # Differs from the reference: layers.{i}.down:input"
    assert f'{remark}\n    "layers.{{i}}.down:input": "blocks.{{i}}.act",\n' in text
    assert {line["target"]: line["equal"] for line in proposal.to_json()["sites"]}["blocks.{i}.act"] is False
    names: dict[str, object] = {}
    exec(text, names)
    judged = dataclasses.replace(sides.in_nnx(sides.tanh_gelu), sites=names["sites"])
    report = vit_ref.compare(torch_side.reference(), judged, backward=False, fail_fast=True)
    assert report.forward.semantic_failures[0].site == "blocks.0.act"


def test_one_wrong_block_of_several_leaves_a_table_that_can_be_pasted() -> None:
    def load(checkpoint: str) -> sides.NnxModel:
        model = sides.NnxModel()
        model.layers[1].act = sides.tanh_gelu
        return model

    wrong = vit_ref.Candidate(load=load, name="nnx")
    proposal = propose(torch_side.reference(), wrong)
    assert {line.key: line.site for line in proposal.lines} == sides.NNX_SITES
    text, names = str(proposal), dict[str, Any]()
    remark = "    # Differs from the reference: layers.1.down:input"
    assert f'{remark}\n    "layers.{{i}}.down:input": "blocks.{{i}}.act",\n' in text
    exec(text, names)
    report = vit_ref.compare(
        torch_side.reference(), dataclasses.replace(wrong, sites=names["sites"]), backward=False, fail_fast=True
    )
    assert report.forward.semantic_failures[0].site == "blocks.1.act"


class TanhBlock(torch_side.Block):
    """A block with the wrong activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act = torch_side.torch.nn.GELU("tanh")


class Paired(torch_side.Block):
    """A block with the wrong activation, which a submodule returns in a tuple."""

    class Act(torch_side.torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch_side.torch.nn.functional.gelu(x, approximate="tanh"), None

    def __init__(self) -> None:
        super().__init__()
        self.act = self.Act()

    def forward(self, x: Any) -> Any:
        return x + self.fc2(self.act(self.fc1(self.norm(x)))[0])


def in_torch(block: type[torch_side.Block]) -> vit_ref.Candidate:
    def load(checkpoint: Any) -> Any:
        model = torch_side.Model()
        model.blocks = torch_side.torch.nn.ModuleList([block() for _ in range(sides.BLOCKS)])
        return torch_side.loaded(model)

    return vit_ref.Candidate(load=load, name="torch candidate")


@pytest.mark.parametrize(
    ("candidate", "key"),
    [
        (in_torch(TanhBlock), "blocks.{i}.act"),
        (in_torch(Paired), "blocks.{i}.act[0]"),
        (sides.function(act=sides.tanh_gelu), "blocks.{i}.act"),
    ],
    ids=["torch", "in a tuple", "a function"],
)
def test_a_table_goes_past_a_wrong_value_of_any_kind(candidate: vit_ref.Candidate, key: str) -> None:
    proposal = propose(torch_side.reference(), candidate)
    assert [(line.key, line.site) for line in proposal.lines if not line.equal] == [(key, "blocks.{i}.act")]
    assert not proposal.unshown


def test_a_wrong_value_with_nothing_equal_after_it_ends_the_table() -> None:
    right = sides.in_nnx()

    def load(checkpoint: object) -> Any:
        model = right.load(checkpoint)
        model.head.bias[...] += 1
        return model

    proposal = propose(torch_side.reference(), dataclasses.replace(right, load=load, sites=None))
    assert proposal.unshown == ("head",)
    text = str(proposal)
    assert "# Sites that nothing equals: head" in text and "equal no site: head" in text
    assert all(line.equal for line in proposal.lines)


def test_an_image_of_another_order_of_axes_is_given_to_the_candidate() -> None:
    turned = convolved.candidate(lambda weight: weight.flip(2, 3))
    proposal = propose(convolved.reference(), turned)
    assert [(line.site, line.equal) for line in proposal.lines] == [
        ("block.0", True),
        ("block.1", False),
        ("block.2", False),
        ("block", False),
        ("head", True),
    ]


def test_a_container_goes_to_a_container_and_an_order_of_axes_is_written_once() -> None:
    proposal = propose(convolved.reference(), convolved.candidate())
    pairs = [("pair.first", "block.0"), ("pair.last", "block.1"), ("pair.last", "block.2"), ("pair", "block")]
    assert [(line.key, line.site) for line in proposal.lines] == [*pairs, ("out", "head")]
    assert proposal.unused == () and proposal.unshown == ()
    assert str(proposal).count(".transpose(0, 3, 1, 2)") == 1
    names: dict[str, object] = {}
    exec(str(proposal), names)
    judged = dataclasses.replace(convolved.candidate(), sites=names["sites"])
    assert vit_ref.compare(convolved.reference(), judged, backward=False).passed
