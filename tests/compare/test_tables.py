"""Is a table that does not fit refused in one line, which says whose it is?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vit_ref
from vit_ref.errors import InputError

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
pytestmark = pytest.mark.torch


class Model(torch.nn.Module):
    """Two layers that run, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.output, self.last, self.aux = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2), torch.nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.output(x)))


def compared(theirs: Any, ours: Any) -> Any:
    x = {"x": np.random.default_rng(0).normal(size=(4, 3))}
    return vit_ref.compare(
        vit_ref.Reference(load=lambda checkpoint: Model(), sites=theirs, name="theirs"),
        vit_ref.Candidate(load=lambda checkpoint: Model(), sites=ours, name="ours"),
        inputs=x,
        backward=False,
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (["last"], {}, r"^theirs: sites: a list: give a dict"),
        ({3: "last"}, {}, r"^theirs: sites: 3: 'last' cannot be read"),
        ({"last": None}, {}, r"^theirs: sites: 'last': None cannot be read"),
        ({"lost": "last"}, {}, r"^theirs: sites: it has no submodule 'lost'.*did you mean 'last'"),
        ({"aux": "aux", "last": "last"}, {}, r"^theirs: sites: 'aux' has no value: its submodule is not called"),
        (None, ["last"], r"^ours: sites: a list: give a dict"),
        (None, {"last": "lost"}, r"^ours: sites: 'last': 'lost' is none of this model's; did you mean 'last'"),
        (None, {"lost": "last"}, r"^ours: sites: it has no submodule 'lost'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(theirs: Any, ours: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compared(theirs, ours)


def test_a_candidate_may_show_some_of_the_sites_in_one_line_of_the_references_table() -> None:
    theirs = {"output": [("left", lambda x: x[..., :3]), ("right", lambda x: x[..., 3:])]}
    report = compared(theirs, {"output": ("left", lambda x: x[..., :3])})
    assert report.passed and [result.site for result in report.forward.results] == ["left", "output"]


def test_a_submodule_with_the_outputs_name_is_no_site() -> None:
    assert compared(None, {"last": "last"}).forward.order == ("last", "output")


class Stacked(torch.nn.Module):
    """Two blocks whose activation is one module, which runs in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        self.act = torch.nn.Tanh()

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = self.act(block(x))
        return x


def test_numbers_of_blocks_reach_each_form_of_a_line_and_repeated_modules_are_named() -> None:
    def half(x: Any) -> Any:
        return x[..., :1]

    theirs = {"blocks.{i}": ["first.{i}", ("half.{i}", half)]}
    report = vit_ref.compare(
        vit_ref.Reference(load=lambda checkpoint: Stacked(), sites=theirs, name="theirs"),
        vit_ref.Candidate(load=lambda checkpoint: Stacked(), sites={"blocks.{i}": "first.{i}"}, name="ours"),
        inputs={"x": np.random.default_rng(0).normal(size=(4, 3))},
        backward=False,
    )
    assert report.passed
    assert [result.site for result in report.forward.results] == ["first.0", "first.1", "output"]
    assert report.forward.unmapped == ("half.0", "half.1")


def test_a_repeated_module_is_no_site_and_is_named() -> None:
    report = vit_ref.compare(
        vit_ref.Reference(load=lambda checkpoint: Stacked(), name="theirs"),
        vit_ref.Candidate(load=lambda checkpoint: Stacked(), name="ours"),
        inputs={"x": np.random.default_rng(0).normal(size=(4, 3))},
        backward=False,
    )
    assert any("run more than once in a pass: act" in note for note in report.notes)


def test_channels_first_belongs_to_verify() -> None:
    with pytest.raises(InputError, match=r"^ours: channels_first belongs to verify: move the axes in adapt="):
        vit_ref.compare(
            vit_ref.Reference(load=lambda checkpoint: Model(), name="theirs"),
            vit_ref.Candidate(load=lambda checkpoint: Model(), channels_first=True, name="ours"),
            inputs={"x": np.zeros((4, 3))},
        )


def test_a_value_of_another_shape_fails_and_has_no_gradient() -> None:
    report = vit_ref.compare(
        vit_ref.Reference(load=lambda checkpoint: Model(), name="theirs"),
        vit_ref.Candidate(load=lambda checkpoint: Model(), sites={"output": "last"}, name="ours"),
        inputs={"x": np.random.default_rng(0).normal(size=(4, 3))},
    )
    statuses = {check.name: check.status for check in report.checks}
    assert statuses["forward/last"] == "failed" and statuses["forward/output"] == "passed"
    assert statuses["backward/last"] == "not observed"
