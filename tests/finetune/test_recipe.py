"""Is a recipe with an impossible value refused, and a valid one read back as it was written?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vit_ref.cli.commands import main
from vit_ref.errors import InputError
from vit_ref.finetune import run
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.recipe_options import make_recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 2.0),
        ("grad_accum_steps", 0),
        ("freeze_blocks", -2),
        ("seed", -1),
        ("seed", 5_000_000_000),
        ("epochs", 10**20),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_ratio", 1.5),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("layer_decay", 0.0),
        ("grad_clip", 0.0),
        ("label_smoothing", 1.0),
        ("dropout", 1.0),
        ("image_size", 0),
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("precision", "float16"),
        ("head", "old"),
        ("attention", "flash"),
        ("attention", "cudnn"),  # without mixed precision
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{field} is .*: give "):
        Recipe(**{field: value})


def test_it_is_read_back_as_written() -> None:
    recipe = Recipe(epochs=7, optimizer="adamw", grad_clip=1.0, image_size=112, augment=False)
    assert Recipe(**json.loads(json.dumps(recipe.to_json()))) == recipe


def test_the_defaults_are_the_tutorials() -> None:
    recipe = Recipe()
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum, recipe.schedule, recipe.epochs) == (
        "sgd",
        1e-3,
        0.8,
        "linear",
        3,
    )


def test_options_that_are_not_given_leave_the_defaults() -> None:
    nothing = {field.name: None for field in dataclasses.fields(Recipe)}
    assert make_recipe(nothing) == Recipe()
    assert make_recipe({**nothing, "augment": False, "seed": 0, "epochs": 9}) == Recipe(augment=False, epochs=9)


def test_what_is_asked_for_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def stopped(source: str, training: object, validation: object, *given: object, **options: object) -> None:
        calls.append((source, *given, options))
        raise InputError("enough")

    monkeypatch.setattr(run, "finetune", stopped)
    recipe = "--epochs 5 --batch-size 16 --learning-rate 0.1 --weight-decay 0.2 --warmup-ratio 0.3 --freeze-blocks 2"
    recipe += " --grad-accum-steps 4 --grad-clip 1.5"
    conduct = "--num-workers 1 --save-steps 7 --save-total-limit 3 --no-plots --ignore a"
    ended = CliRunner().invoke(
        main, ["finetune", "there", "--output-dir", str(tmp_path), *f"{recipe} {conduct}".split()]
    )
    assert ended.output == "vit-ref: enough\n"
    expected = Recipe(
        epochs=5,
        batch_size=16,
        learning_rate=0.1,
        weight_decay=0.2,
        warmup_ratio=0.3,
        freeze_blocks=2,
        grad_accum_steps=4,
        grad_clip=1.5,
    )
    conducted = run.Conduct(num_workers=1, save_steps=7, save_total_limit=3)
    assert calls == [("there", tmp_path, expected, conducted, {"resume": False, "ignore": ("a",)})]
