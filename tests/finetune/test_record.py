"""Does the log of a run hold each step once, with the right values?"""

from __future__ import annotations

import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vit_ref.errors import InputError
from vit_ref.finetune.directory import METRICS, TIMING
from vit_ref.finetune.metrics import Evaluation, read_metrics
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.record import Record

RECIPE = Recipe(epochs=2, grad_accum_steps=2)
# The model predicted the first two of three images correctly.
FOUND = Evaluation(np.diag([1, 1, 0]) + np.eye(3, dtype=np.int64)[::-1] * [[0], [0], [1]], 1.5)


def record(directory: Path, done: int = 0, **changes: Any) -> Record:
    settings = {"writes": True, "tensorboard": False, "quiet": True, **changes}
    return Record(directory, RECIPE, lambda update: jnp.float32(8 - update), 3, done, **settings)


def test_every_step_has_its_number_epoch_loss_and_rate(tmp_path: Path) -> None:
    log = record(tmp_path)
    for step in range(1, 4):
        log.step(step, jnp.float32(step / 4))
        # The loss of the last step may not be there yet.
        assert len(read_metrics(tmp_path / METRICS)) == step - 1
    log.flush()
    log.validated(3, FOUND)
    log.step(4, jnp.float32(4))
    log.close()
    # Two steps make an update.
    rates = {1: 8, 2: 8, 3: 7, 4: 7}
    steps = [{"step": k, "epoch": 1, "loss": k / 4, "learning_rate": rates[k]} for k in (1, 2, 3)]
    looked = {"validation_loss": 0.5, "validation_accuracy": 2 / 3, "validation_accuracy_by_class": [1, 1, 0]}
    assert read_metrics(tmp_path / METRICS) == [
        *steps,
        {"step": 3, "epoch": 1, **looked},
        {"step": 4, "epoch": 2, "loss": 4, "learning_rate": 7},
    ]
    assert [line["step"] for line in read_metrics(tmp_path / TIMING)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("terminal", "changes", "shown"),
    [(True, {}, True), (False, {}, False), (True, {"quiet": True}, False), (True, {"writes": False}, False)],
)
def test_a_terminal_shows_the_step_and_its_loss(
    terminal: bool, changes: dict[str, bool], shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # it colours a file, and makes no terminal of it
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with closing(record(tmp_path, 3, **{"quiet": False, **changes})) as log:
        log.step(4, jnp.float32(2.5))
        print("a result")
    printed, said = capsys.readouterr()
    assert printed == "a result\n"
    assert ("4/6" in said and "epoch 2, loss 2.500, " in said) if shown else said == ""


def test_the_speed_is_that_of_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Created at 0; a step until 4; validation until 100; a step until 102.
    clock = iter([0.0, 4.0, 100.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    log = record(tmp_path)
    log.step(1, jnp.float32(1))
    log.flush()
    log.validated(1, FOUND)
    log.step(2, jnp.float32(1))
    log.close()
    assert [line["images_per_second"] for line in read_metrics(tmp_path / TIMING)] == [32 / 4, 32 / 2]


def test_what_was_logged_of_later_steps_is_dropped(tmp_path: Path) -> None:
    for done in (0, 2):
        log = record(tmp_path, done)
        for step in range(done + 1, 5):
            log.step(step, jnp.float32(done))
        log.close()
    for name in (METRICS, TIMING):
        assert [line["step"] for line in read_metrics(tmp_path / name)] == [1, 2, 3, 4]
    assert [line["loss"] for line in read_metrics(tmp_path / METRICS)] == [0, 0, 2, 2]


def test_a_process_that_does_not_write_still_checks_the_loss(tmp_path: Path) -> None:
    log = record(tmp_path, writes=False)
    log.step(1, jnp.float32(1))
    log.flush()
    log.validated(1, FOUND)
    log.step(2, jnp.float32(math.inf))
    with pytest.raises(InputError, match="the loss at step 2 is inf: lower learning_rate"):
        log.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_finite_is_seen_before_it_is_saved(tmp_path: Path) -> None:
    diverged = Evaluation.of_logits(np.full((2, 3), np.nan), [0, 1])
    with (
        closing(record(tmp_path)) as log,
        pytest.raises(InputError, match="the loss after step 6, on the validation images, is nan: lower"),
    ):
        log.validated(6, diverged)
