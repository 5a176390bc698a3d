"""Is the output that a declaration picks one array, or several that are joined, and is anything else one line?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import vit_ref
from vit_ref.errors import CandidateError
from vit_ref.verify.candidates.loading import split_output

ONES, TWOS = np.ones((2, 3)), 2 * np.ones((2, 2, 1))


def picked(returned: Any, output: Callable[[Any], Any] = lambda found: found) -> Any:
    return split_output(returned, vit_ref.Candidate(load=print, output=output, name="mine"))[0]


def test_several_arrays_are_joined_row_by_row() -> None:
    found = picked((jnp.asarray(ONES), jnp.asarray(TWOS)))
    np.testing.assert_array_equal(found, [[1, 1, 1, 2, 2]] * 2)


@pytest.mark.torch
def test_several_tensors_are_joined_row_by_row() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    found = picked((torch.tensor(ONES), torch.tensor(TWOS)))
    np.testing.assert_array_equal(found, [[1, 1, 1, 2, 2]] * 2)


def test_one_number_a_row_becomes_a_column() -> None:
    assert picked({"score": np.ones(4)}).shape == (4, 1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda found: found["lost"], r"^mine: output\(\) of a dict raised KeyError: 'lost'"),
        (lambda found: (ONES, "text"), r"^mine: output\(\) returned a str: make it pick one array, or several"),
        (lambda found: np.float64(3), r"^mine: output\(\) returned a value of shape \(\): make it pick one array"),
    ],
)
def test_an_output_that_is_no_array_is_one_line(output: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(CandidateError, match=message):
        picked({"logits": ONES}, output)


def test_outputs_in_a_mapping_are_joined_by_name_on_both_sides() -> None:
    def load(checkpoint: Any) -> Any:
        def forward(w: Any, x: Any) -> Any:
            return {"scores": x @ w, "boxes": x @ w[:, ::-1]}

        return forward, np.random.default_rng(0).normal(size=(3, 2)).astype("f4")

    def compared(output: Callable[[Any], Any]) -> Any:
        return vit_ref.compare(
            vit_ref.Reference(load=load, output=lambda found: found, name="theirs"),
            vit_ref.Candidate(load=load, output=output, name="mine"),
            inputs={"x": np.random.default_rng(1).normal(size=(4, 3))},
            backward=False,
        )

    assert compared(lambda found: dict(reversed(found.items()))).passed
    assert not compared(lambda found: {"boxes": found["scores"], "scores": found["boxes"]}).passed
    for output, names in (
        (lambda found: {"box": found["boxes"], "scores": found["scores"]}, "box, scores"),
        (lambda found: (found["scores"], found["boxes"]), "values without names"),
    ):
        message = f"^mine: its output= returns {names}, and the reference's returns boxes, scores: return mappings"
        with pytest.raises(CandidateError, match=message):
            compared(output)


def test_more_than_ten_outputs_in_a_tuple_keep_their_order() -> None:
    found = picked(tuple(np.full((1, 1), k) for k in range(12)))
    np.testing.assert_array_equal(found, [range(12)])
