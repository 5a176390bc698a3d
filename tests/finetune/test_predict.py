"""Does `predict` print what the model computes, and is unusable input one line with exit code 2?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import vit_ref
from tests.helpers.precisions import precision_of
from vit_ref.cli.commands import main
from vit_ref.errors import InputError
from vit_ref.finetune.prediction import predict
from vit_ref.model.vit import VisionTransformer
from vit_ref.preprocessing import preprocess
from vit_ref.verify.cases import CASES

Filled = Callable[..., VisionTransformer]
CONFIG = replace(CASES["rectangular"].config, num_channels=3, num_labels=6, labels=("a", "b", "c", "d", "e", "f & g"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    files = [directory / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        pixels = rng.integers(50 * i, 50 * i + 56, (3 + i, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((30 + i, 20)).save(file)
    return files


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predictions_are_the_models_own(batch_size: int, filled: Filled, photographs: list[Path]) -> None:
    with precision_of(np.float64).active():
        model = filled(CONFIG, dtype=np.float64)
        found = predict(model, photographs, 6, batch_size=batch_size)
        logits = [np.asarray(model(jnp.asarray(preprocess([file], CONFIG), np.float64))[0]) for file in photographs]
    assert len({tuple(name for name, _ in each) for each in found}) > 1
    for each, row in zip(found, logits, strict=True):
        expected = np.exp(row) / np.exp(row).sum()
        names, probabilities = zip(*each, strict=True)
        assert list(names) == [CONFIG.labels[i] for i in sorted(range(6), key=lambda i: -expected[i])]
        # float64 throughout. A batch of another size may add in another order.
        np.testing.assert_allclose(probabilities, sorted(expected, reverse=True), rtol=1e-12)


@pytest.mark.parametrize("top", [1, 3, 6, 7])
def test_as_many_classes_as_are_asked_for_and_are_there(top: int, filled: Filled, photographs: list[Path]) -> None:
    model = filled(CONFIG)
    found, whole = predict(model, photographs, top), predict(model, photographs, 6)
    assert found == [each[:top] for each in whole]
    assert len(found[0]) == min(top, 6)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_labels_that_are_not_exclusive_have_independent_numbers(
    problem_type: str, filled: Filled, photographs: list[Path]
) -> None:
    with precision_of(np.float64).active():
        model = filled(replace(CONFIG, extra={"problem_type": problem_type}), dtype=np.float64)
        found = predict(model, photographs[:1], 3)[0]
        logits = np.asarray(model(jnp.asarray(preprocess(photographs[:1], CONFIG), np.float64))[0])
    if problem_type == "regression":
        # All values, in their own order, because no value is likelier than another.
        expected = zip(CONFIG.labels, logits, strict=True)
        assert found == [(name, pytest.approx(value, rel=1e-12)) for name, value in expected]
    else:
        order = np.argsort(-logits)[:3]
        expected = [(CONFIG.labels[i], pytest.approx(1 / (1 + np.exp(-logits[i])), rel=1e-12)) for i in order]
        assert found == expected


def test_probabilities_that_round_to_one_are_still_in_order(filled: Filled, photographs: list[Path]) -> None:
    model = filled(replace(CONFIG, extra={"problem_type": "multi_label_classification"}))
    model.head.kernel[...] = model.head.kernel[...] * 0
    model.head.bias[...] = jnp.asarray([50.0, 70.0, 60.0, 40.0, 90.0, 80.0], model.head.bias.dtype)
    found = predict(model, photographs[:1], 6)[0]
    assert found == [(name, 1.0) for name in ("e", "f & g", "b", "c", "a", "d")]


def test_classes_without_names_have_hugging_faces() -> None:
    assert replace(CONFIG, labels=()).class_names == tuple(f"LABEL_{i}" for i in range(6))
    assert CONFIG.class_names == CONFIG.labels
    assert replace(CONFIG, num_labels=0, labels=()).class_names == ()


@pytest.mark.parametrize(("batch_size", "computed"), [(2, 2), (8, 5)])
def test_prediction_compiles_once_and_computes_no_surplus_images(
    batch_size: int, computed: int, filled: Filled, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, call = [], VisionTransformer.__call__
    monkeypatch.setattr(
        VisionTransformer, "__call__", lambda self, pixels: traced.append(pixels.shape) or call(self, pixels)
    )
    model = filled(replace(CONFIG, initializer_range=0.123))
    assert predict(model, [], batch_size=batch_size) == []
    predict(model, photographs, batch_size=batch_size)
    assert traced == [(computed, 10, 40, 3)]


def test_predictions_are_of_evaluation_mode_and_keep_the_mode(filled: Filled, photographs: list[Path]) -> None:
    model = filled(CONFIG)
    expected = predict(model, photographs)
    model.train()
    assert predict(model, photographs) == expected
    assert not model.dropout.deterministic


def _without_numbers(model: VisionTransformer) -> VisionTransformer:
    model.head.bias[...] = model.head.bias[...] * np.float32(np.nan)
    return model


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"num_labels": 0, "labels": ()}, {}, "the model has no head, so it has no classes: "),
        ({}, {"top": 0}, "top is 0: give at least 1"),
        ({}, {"batch_size": -1}, "batch_size is -1: give at least 1"),
        (
            {"preprocessor": {"size": [20, 40]}},
            {},
            r"preprocessing makes images of \[20, 40\] pixels, and the model takes \[10, 40\]",
        ),
        ({"num_channels": 2}, {}, "the model takes 2"),
        (
            {"extra": {"problem_type": "other"}},
            {},
            "^config.json: problem_type is 'other', which is unknown: give one of",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    change: dict[str, Any], options: dict[str, int], message: str, filled: Filled, photographs: list[Path]
) -> None:
    with pytest.raises(InputError, match=message):
        predict(filled(replace(CONFIG, **change)), photographs, **options)


def test_logits_that_are_no_numbers_are_refused(filled: Filled, photographs: list[Path]) -> None:
    with pytest.raises(InputError, match=r"0\.png: the model's logits are not all finite"):
        predict(_without_numbers(filled(CONFIG)), photographs)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, ["predict", *(str(argument) for argument in arguments)])


def saved(model: VisionTransformer, directory: Path) -> Path:
    vit_ref.save_pretrained(model, directory)
    return directory


def test_the_command_prints_the_likeliest_classes_of_each_image(
    filled: Filled, photographs: list[Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    model = filled(CONFIG)
    result = invoke(saved(model, tmp_path), *photographs[:2], "--top", 2)
    assert result.exit_code == 0, result.output
    expected = []
    for file, each in zip(photographs, predict(model, photographs[:2], 2), strict=False):
        expected += [str(file), *(f"{100 * value:7.2f} %  {name}" for name, value in each)]
    assert result.stdout.splitlines() == expected
    assert result.stderr == ""


def test_the_command_prints_json_for_machines(
    filled: Filled, photographs: list[Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    model = filled(CONFIG)
    content = json.loads(invoke(saved(model, tmp_path), *photographs, "--json", "-").stdout)
    assert [each["image"] for each in content] == [str(file) for file in photographs]
    found = [[(one["label"], one["probability"]) for one in each["predictions"]] for each in content]
    assert found == predict(model, photographs)


def test_the_command_prints_the_values_of_a_regression_as_such(
    filled: Filled, photographs: list[Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    model = filled(replace(CONFIG, extra={"problem_type": "regression"}))
    directory, expected = saved(model, tmp_path), predict(model, photographs[:1])[0]
    lines = invoke(directory, photographs[0]).stdout.splitlines()
    assert lines == [str(photographs[0]), *(f"{value:12.6g}  {name}" for name, value in expected)]
    (content,) = json.loads(invoke(directory, photographs[0], "--json", "-").stdout)
    assert content["predictions"] == [{"label": name, "value": value} for name, value in expected]


@pytest.mark.parametrize("flags", [(), ("--json", "-")])
def test_a_file_name_that_is_not_unicode_is_printed(
    flags: tuple[str, ...], filled: Filled, photographs: list[Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff.png")
    odd.write_bytes(photographs[0].read_bytes())
    result = invoke(saved(filled(CONFIG), tmp_path), odd, *flags)
    assert result.exit_code == 0, result.output
    assert ".png" in result.stdout


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("damaged.png", "damaged.png: not a readable image"),
        ("missing.png", "missing.png: not a readable image (No such file or directory)"),
        (".", ": not a readable image (Is a directory)"),
    ],
)
def test_a_bad_image_among_several_is_named_with_exit_code_2(
    bad: str,
    message: str,
    filled: Filled,
    photographs: list[Path],
    tmp_path: Path,
    invoke: Callable[..., Result],
) -> None:
    (tmp_path / "damaged.png").write_bytes(photographs[0].read_bytes()[:70])
    result = invoke(saved(filled(CONFIG), tmp_path / "model"), *photographs, tmp_path / bad)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"num_labels": 0, "labels": ()}, ["0.png"], "vit-ref: the model has no head"),
        ({}, [], "Missing argument 'IMAGE...'"),
        ({}, ["0.png", "--top", "0"], "Invalid value for '--top'"),
    ],
)
def test_unusable_arguments_end_in_exit_code_2(
    change: dict[str, Any],
    arguments: list[str],
    message: str,
    filled: Filled,
    photographs: list[Path],
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photographs[0].parent)
    result = invoke(saved(filled(replace(CONFIG, **change)), tmp_path), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
