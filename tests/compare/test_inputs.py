"""Are named inputs made, adapted and differentiated as declared, and else refused in one line?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

import vit_ref
from tests.compare import sides
from vit_ref.errors import InputError
from vit_ref.verify.candidates.feeding import Arguments, Feeding
from vit_ref.verify.candidates.table import gradients_by_path
from vit_ref.verify.pairs.given import find_inputs
from vit_ref.verify.pairs.outline import DeclaredOutline
from vit_ref.verify.pairs.parameters import find_move, match_parameters

RNG = np.random.default_rng(0)
IMAGES, IDS = RNG.normal(size=(2, 3, 5, 4)).astype("f4"), RNG.integers(0, 9, (2, 6))


def feeding(adapt: Callable[..., Any] | None, **inputs: NDArray) -> Feeding:
    return Feeding(inputs, adapt, "mine")


def test_one_input_is_positional_and_several_are_keywords() -> None:
    assert len(feeding(None, images=IMAGES).arguments().args) == 1
    assert list(feeding(None, images=IMAGES, ids=IDS).arguments().kwargs) == ["images", "ids"]


def test_an_adaptor_moves_values_and_their_gradients_come_back() -> None:
    fed = feeding(lambda images: {"pixels": images.transpose(0, 3, 1, 2)[:, ::-1]}, images=IMAGES)
    np.testing.assert_array_equal(fed.arguments().kwargs["pixels"], IMAGES.transpose(0, 3, 1, 2)[:, ::-1])
    gradient = RNG.normal(size=(2, 4, 3, 5))
    found = fed.by_input(Arguments((), {"pixels": gradient}))
    np.testing.assert_array_equal(found["input:images"], gradient[:, ::-1].transpose(0, 2, 3, 1))


def test_a_value_that_is_used_twice_gets_the_sum_of_gradients() -> None:
    fed = feeding(lambda images: (images, images[:1]), images=IMAGES)
    found = fed.by_input(Arguments((np.ones((2, 3, 5, 4)), np.ones((1, 3, 5, 4))), {}))
    np.testing.assert_array_equal(found["input:images"][:, 0, 0, 0], [2, 1])


def test_a_decorated_adaptor_takes_what_its_decorator_takes() -> None:
    @functools.wraps(lambda pixels: pixels)
    def renamed(**given: Any) -> Any:
        return {"pixels": given["images"]}

    assert feeding(renamed, images=IMAGES).arguments().kwargs["pixels"] is not None


def test_integers_are_neither_cast_nor_differentiated() -> None:
    fed = feeding(lambda ids: {"input_ids": ids, "positions": np.arange(6)[None]}, ids=IDS)
    assert fed.arguments().kwargs["input_ids"].dtype == IDS.dtype
    assert fed.by_input(Arguments((), {"input_ids": None, "positions": None})) == {}


def test_a_name_that_an_adaptor_does_not_take_is_said_with_those_that_it_takes() -> None:
    message = r"^mine: it takes no input 'image', only images, ids: correct the name of the input, or the argument of"
    with pytest.raises(InputError, match=message):
        feeding(lambda images, *, ids: (images, ids), image=IMAGES, ids=IDS)
    with pytest.raises(InputError, match=r"^mine: it takes no input 'images', only none at all: "):
        feeding(lambda: IMAGES, images=IMAGES)
    # It takes any name.
    assert feeding(lambda **given: given, image=IMAGES).arguments().kwargs.keys() == {"image"}


def raising(**_: Any) -> None:
    raise KeyError("ids")


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (lambda images: images - 0.5, r"mine: adapt\(\) computes values"),
        (lambda images: -images, r"mine: adapt\(\) computes values"),
        (lambda images: images.astype(np.int32), r"mine: adapt\(\) computes values"),
        (lambda images: images > 0, r"mine: adapt\(\) computes values"),
        (lambda images: np.array(["a"]), r"returned an array of <U1 among its arguments"),
        (lambda images: (images,) * (1 + int(images.max() > 9)), r"mine: adapt\(\) computes values"),
        (lambda images: {"pixels": images, "flag": True}, r"returned a bool among its arguments"),
        (raising, r"mine: adapt\(\) of images raised KeyError"),
    ],
)
def test_an_adaptor_that_does_more_than_move_is_refused(adapt: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        feeding(adapt, images=IMAGES)


REFERENCE = vit_ref.Reference(load=print, inputs=sides.inputs, name="theirs")


def test_floats_are_rounded_to_float32_once() -> None:
    found = find_inputs(REFERENCE, None)
    assert found["features"].dtype == np.float32 and found["ids"].dtype == np.int64


def test_a_file_takes_the_place_of_the_references_function(tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", images=IMAGES, ids=IDS)
    found = find_inputs(REFERENCE, tmp_path / "batch.npz")
    np.testing.assert_array_equal(found["images"], IMAGES)
    np.testing.assert_array_equal(found["ids"], IDS)


def test_a_file_that_holds_no_named_arrays_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", IMAGES)
    np.savez(tmp_path / "objects.npz", images=np.array([{}], dtype=object))
    np.savez_compressed(tmp_path / "damaged.npz", images=IMAGES)
    whole = bytearray((tmp_path / "damaged.npz").read_bytes())
    whole[100:140] = b"\xff" * 40
    (tmp_path / "damaged.npz").write_bytes(whole)
    for name, message in (
        ("text.npz", "cannot be read"),
        ("one.npy", "it holds an array without a name"),
        ("objects.npz", "cannot be"),
        ("damaged.npz", "cannot be read"),
        ("none.npz", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            find_inputs(REFERENCE, tmp_path / name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "it has no array"),
        ({"x": np.array(["a"])}, "'x' has dtype <U1"),
        ({"x": np.zeros((0, 3))}, "it is empty"),
        ({"x": np.full((2, 3), np.nan)}, "'x' has NaN in it"),
        ({"x": np.float32(1)}, "'x' is a single number"),
        ({"x": [[1, 2], [3]]}, "inputs: 'x' is no array"),
        ({"x": np.full((2, 3), 1e300)}, "'x' has numbers too large for float32"),
        ([1, 2], "inputs is a list: give a mapping"),
        (np.ones((2, 3)), "inputs is a ndarray: give a mapping"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_inputs(REFERENCE, given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "theirs: it declares no inputs: use"),
        (lambda seed: IMAGES, "returned a ndarray"),
        (lambda seed: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_function_of_inputs_that_fails_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_inputs(vit_ref.Reference(load=print, inputs=make, name="theirs"), None)


def test_parameters_are_told_by_their_values() -> None:
    kernel, bias = RNG.normal(size=(4, 6)), RNG.normal(size=6)
    table = match_parameters(
        {"a": kernel, "b": bias, "zeros": np.zeros(3)}, {"fc.weight": kernel.T, "fc.bias": bias, "z.bias": np.zeros(3)}
    )
    assert {path: name for path, (name, _) in table.items()} == {"a": "fc.weight", "b": "fc.bias", "zeros": "z.bias"}


def test_parameters_that_are_equal_to_each_other_are_left_out() -> None:
    zeros = np.zeros(3)
    assert match_parameters({"a": zeros, "b": zeros}, {"x": zeros, "y": zeros}) == {}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (IMAGES, IMAGES.transpose(3, 2, 0, 1)),
        (IMAGES.reshape(6, 20), IMAGES),
        (IMAGES[0], IMAGES[0].reshape(15, 4).T),
        (IMAGES[0].reshape(15, 4).T, IMAGES[0]),
    ],
)
def test_axes_are_found_that_make_one_value_of_another(value: NDArray, wanted: NDArray) -> None:
    move = find_move(value, wanted)
    assert move is not None
    np.testing.assert_array_equal(move(value), wanted)
    assert find_move(value, wanted + 1) is None


def test_equal_numbers_in_no_order_of_axes_are_left_out() -> None:
    kernel = RNG.normal(size=(4, 6))
    shuffled = RNG.permuted(kernel.ravel()).reshape(4, 6)
    assert match_parameters({"a": shuffled, "none": np.zeros((0, 3))}, {"x": kernel, "nothing": np.zeros((0, 3))}) == {}


def test_more_axes_than_can_be_tried_are_only_reshaped() -> None:
    six = RNG.normal(size=(1, 2, 1, 3, 1, 2))
    assert find_move(six, six.reshape(1, 2, 3, 1, 2, 1)) is not None
    assert find_move(six, six.transpose(5, 4, 3, 2, 1, 0)) is None


ROLES = ("query", "key", "value")


@pytest.mark.parametrize(
    "fuse",
    [
        lambda parts: np.concatenate(parts, axis=0),
        lambda parts: np.concatenate(parts, axis=1).T,
        lambda parts: np.stack([part.T.reshape(6, 2, 3) for part in parts], axis=1),
    ],
    ids=["rows", "columns", "an axis of their own"],
)
def test_a_fused_parameter_is_matched_part_by_part(fuse: Callable[[list[NDArray]], NDArray]) -> None:
    wanted = {f"attn.{role}.weight": RNG.normal(size=(6, 6)) for role in ROLES} | {"fc.weight": RNG.normal(size=(6, 4))}
    own = {"qkv": fuse([wanted[f"attn.{role}.weight"] for role in ROLES]), "fc": wanted["fc.weight"].T}
    table = match_parameters(own, wanted)
    assert [name for name, _ in table["qkv"]] == [f"attn.{role}.weight" for role in ROLES]
    outline = DeclaredOutline({}, (), {name: value.shape for name, value in wanted.items()})
    gradients = gradients_by_path(table, outline, own)
    for name, value in wanted.items():
        np.testing.assert_array_equal(gradients[name], value)


@pytest.mark.parametrize("dtype", ["?", "i4", "c8", "c16", np.longdouble])
def test_parameters_that_are_not_floats_are_left_out(dtype: DTypeLike) -> None:
    kernel, bias = RNG.normal(size=(4, 6)), RNG.normal(size=6).astype(ml_dtypes.bfloat16)
    other = (RNG.normal(size=(4, 6)) > 0).astype(dtype)
    wanted = {"fc.weight": kernel.T, "fc.bias": bias, "other": other, "part": other[:2]}
    table = match_parameters({"kernel": kernel, "bias": bias, "other": other, "fused": other}, wanted)
    assert {path: name for path, (name, _) in table.items()} == {"kernel": "fc.weight", "bias": "fc.bias"}


def test_parts_of_a_fused_parameter_that_are_constant_are_left_out() -> None:
    query, value, zeros = RNG.normal(size=6), RNG.normal(size=6), np.zeros(6)
    table = match_parameters(
        {"qkv": np.concatenate([query, zeros, value])}, {"q.bias": query, "v.bias": value, "other.bias": zeros}
    )
    assert [name for name, _ in table["qkv"]] == ["q.bias", "v.bias"]
    assert match_parameters({"qkv": RNG.normal(size=18)}, {"q.bias": query}) == {}


def test_inputs_are_taken_if_the_references_own_cannot_be_made() -> None:
    def missing(seed: int) -> Any:
        raise FileNotFoundError("no such data set")

    reference = vit_ref.Reference(load=lambda checkpoint: None, inputs=missing, name="mine")
    assert list(find_inputs(reference, {"y": np.ones((2, 3))})) == ["y"]
    named = vit_ref.Reference(load=lambda checkpoint: None, inputs=lambda seed: {0: np.ones((2, 3))}, name="mine")
    assert list(find_inputs(named, {"0": np.ones((2, 3))})) == ["0"]
    with pytest.raises(InputError, match=r"^inputs: 'y' is no input of mine: name it '0'$"):
        find_inputs(named, {"y": np.ones((2, 3))})
