"""The record of a run while it runs: metrics, timing and a progress bar."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vit_ref.errors import InputError
from vit_ref.finetune.directory import METRICS, TENSORBOARD, TIMING
from vit_ref.finetune.metrics import Evaluation, MetricsLog
from vit_ref.finetune.recipe import Recipe


class Record:
    """The log of a run, and its progress bar.

    Metrics depend on the recipe alone, so that two runs can be compared byte for byte. Speed has a file of its own. The
    record reads the loss of a step after the next step began, so that the device does not wait for Python.

    Args:
      directory: the run's directory.
      recipe: the recipe of the run.
      rate: its learning rate by update.
      per_epoch: number of steps in an epoch.
      done: number of finished steps. The record drops the log of later ones.
      writes: whether this process writes. Only the first of several does.
      tensorboard: whether to write TensorBoard's files too.
      quiet: whether to hide the bar.

    Raises:
      InputError: a file cannot be written. Every method may raise it.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        rate: optax.Schedule,
        per_epoch: int,
        done: int,
        *,
        writes: bool,
        tensorboard: bool,
        quiet: bool,
    ):
        self._recipe, self._rate, self._per_epoch = recipe, rate, per_epoch
        self._logs: tuple[MetricsLog, ...] = ()
        if writes:
            metrics = MetricsLog(directory / METRICS, tensorboard=directory / TENSORBOARD if tensorboard else None)
            self._logs = (metrics, MetricsLog(directory / TIMING))
        for log in self._logs:
            log.truncate_after(done)
        said, times = TextColumn("{task.description}"), (TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *(BarColumn(20), MofNCompleteColumn(), said, *times),
            console=Console(stderr=True),
            # A step of a large model on a CPU takes half a minute.
            speed_estimate_period=3600,
            # What a program prints belongs on its own stdout.
            redirect_stdout=False,
            # FORCE_COLOR makes rich take a file for a terminal.
            disable=quiet or not (writes and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", total=per_epoch * recipe.epochs, completed=done)
        self._bar.start()
        self._pending: tuple[int, jax.Array] | None = None
        self._since = time.perf_counter()

    def step(self, step: int, loss: jax.Array) -> None:
        """Records that a step was started.

        Args:
          step: number of the step, from 1.
          loss: its loss, a scalar. The device may still be computing it.
        """
        self.flush()
        self._pending = step, loss

    def flush(self) -> None:
        """Waits for the loss of the last step, and writes it.

        Raises:
          InputError: the loss is not finite.
        """
        if self._pending is None:
            return
        (step, loss), self._pending = self._pending, None
        value = float(loss)
        _require_finite(value, f"at step {step}")
        now = time.perf_counter()
        speed, self._since = self._recipe.batch_size / (now - self._since), now
        epoch = (step - 1) // self._per_epoch + 1
        said = f"epoch {epoch}, loss {value:.3f}, {speed:.0f} images/s"
        self._bar.update(self._task, completed=step, description=said)
        if self._logs:
            metrics, timing = self._logs
            rate = float(self._rate((step - 1) // self._recipe.grad_accum_steps))
            metrics.write({"step": step, "epoch": epoch, "loss": value, "learning_rate": rate})
            timing.write({"step": step, "images_per_second": speed})

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """Records an evaluation on the validation images.

        Args:
          step: number of finished steps.
          evaluation: its result.

        Raises:
          InputError: its loss is not finite.
        """
        _require_finite(evaluation.loss, f"after step {step}, on the validation images,")
        if self._logs:
            figures = {
                "validation_loss": evaluation.loss,
                "validation_accuracy": evaluation.accuracy,
                "validation_accuracy_by_class": evaluation.per_class,
            }
            self._logs[0].write({"step": step, "epoch": step // self._per_epoch, **figures})
        self._since = time.perf_counter()

    def close(self) -> None:
        """Writes the pending loss, and closes the files."""
        try:
            self.flush()
        finally:
            self._bar.stop()
            for log in self._logs:
                log.close()


def _require_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise InputError(f"the loss {where} is {loss}: lower learning_rate, or give grad_clip, and start a new run")
