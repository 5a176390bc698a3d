"""Does the command propose the table that a person would write?"""

from __future__ import annotations

import dataclasses

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


def test_a_table_stops_where_a_wrong_candidate_diverges() -> None:
    proposal = propose(torch_side.reference(), sides.in_nnx(sides.tanh_gelu))
    assert [line.site for line in proposal.lines] == ["embed", "proj", "blocks.0.norm", "blocks.0.fc1"]
    assert proposal.unshown[0] == "blocks.0.act"
    text, content = str(proposal), proposal.to_json()
    assert "# Sites that nothing equals: blocks.0.act, " in text
    assert content["unshown"] == list(proposal.unshown) and len(content["sites"]) == 4
    assert not proposal.unused or f"equal no site: {', '.join(proposal.unused)}" in text


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
