"""A run's checkpoints, written by Orbax: asynchronous and atomic. The last few and the best are kept."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vit_ref.errors import InputError

# Orbax and tensorstore raise more than OSError for a full disk, a read-only disk or damaged files.
_DISK = (OSError, ValueError, RuntimeError, KeyError, TypeError)

_DAMAGED = ": remove it, and --resume continues from the checkpoint before"


class Progress(NamedTuple):
    """State of a run besides its arrays.

    Attributes:
      step: number of finished steps.
      loader: the loader's state, as JSON takes it.
      accuracy: accuracy and loss on the validation images, or None if they were not evaluated at this step.
    """

    step: int
    loader: Any
    accuracy: tuple[float, float] | None = None


class Saves:
    """The checkpoints in one directory.

    Args:
      directory: the directory, which is made if it does not exist.
      keep: number of latest checkpoints to keep, besides the best.

    Raises:
      InputError: the directory cannot be written to.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory, self._keep = directory.absolute(), keep
        with _one_line(self._directory):
            self._end_deletions()
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    # A process that was killed while it wrote leaves such directories.
                    cleanup_tmp_directories=True,
                ),
            )
        # Orbax's own policy forgets the best when a run resumes, and would delete it.
        self._ranks = {step: _rank(self.progress(step)) for step in self._manager.all_steps()}

    def _end_deletions(self) -> None:
        """Removes checkpoints that a killed process had begun to delete.

        Such a checkpoint has lost its progress, and other files with it. A complete checkpoint has its progress,
        because
        Orbax renames it into place as a whole. The last checkpoint is never deleted.
        """
        if jax.process_index() or not self._directory.is_dir():
            return
        steps = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
        for step in steps[:-1]:
            progress = self._directory / str(step) / "progress"
            if not (progress.is_dir() and any(progress.iterdir())):
                shutil.rmtree(progress.parent)

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Returns which checkpoints to keep: the last few and the best. Orbax calls it after each checkpoint."""
        steps = [each.step for each in checkpoints]
        kept = {*steps[-self._keep :], self._best_of(steps)}
        return [step in kept for step in steps]

    def _best_of(self, steps: Iterable[int]) -> int | None:
        ranked = {step: rank for step in steps if (rank := self._ranks[step])}
        return max(ranked, key=ranked.__getitem__, default=None)

    def save(self, arrays: Mapping[str, jax.Array], progress: Progress) -> None:
        """Writes a checkpoint in the background. The caller may overwrite the arrays once this returns.

        Args:
          arrays: path -> array.
          progress: the state of the run besides its arrays.

        Raises:
          InputError: this checkpoint, or the one before it, cannot be written.
        """
        self._require_space(sum(array.nbytes for array in arrays.values()))
        # The next step reuses the memory of the arrays while Orbax writes, so write copies.
        copies = {name: jnp.copy(array) for name, array in arrays.items()}
        jax.block_until_ready(copies)
        self._ranks[progress.step] = _rank(progress)
        with _one_line(self._directory):
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(copies), progress=ocp.args.JsonSave(progress._asdict())
                ),
                force=True,
            )

    def _require_space(self, size: int) -> None:
        """Checks the free space before the write, because tensorstore prints pages about a full disk."""
        with _one_line(self._directory):
            free = shutil.disk_usage(self._directory).free
        if free < size:
            raise InputError(
                f"{self._directory}: a checkpoint takes {size / 2**20:,.0f} MiB, and the disk has"
                f" {free / 2**20:,.0f} MiB left: make room, and continue with --resume"
            )

    def latest(self) -> int | None:
        """Returns the last step that was written whole, or None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step with the highest accuracy and, among equals, the lowest loss, or None without any."""
        return self._best_of(self._manager.all_steps())

    def progress(self, step: int) -> Progress:
        """Reads what was saved beside the arrays of a step.

        Raises:
          InputError: it cannot be read.
        """
        with _one_line(self._directory / str(step), _DAMAGED):
            read = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
            accuracy = tuple(read["accuracy"]) if read["accuracy"] else None
            return Progress(read["step"], read["loader"], accuracy)

    def restore(self, step: int, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Reads the arrays of a step.

        Args:
          step: number of finished steps.
          like: path -> array with the shape, dtype and sharding that the result has to have.

        Raises:
          InputError: the arrays cannot be read, or belong to another model.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
        with _one_line(self._directory / str(step), _DAMAGED):
            return self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes)))[
                "arrays"
            ]

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          InputError: something could not be written.
        """
        with _one_line(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, and stops the threads."""
        with _one_line(self._directory):
            self._manager.close()


def _rank(progress: Progress) -> tuple[float, float] | None:
    return progress.accuracy and (progress.accuracy[0], -progress.accuracy[1])


@contextlib.contextmanager
def _one_line(place: Path, advice: str = "") -> Iterator[None]:
    try:
        yield
    except _DISK as error:
        raise InputError(
            f"{place}: the checkpoint cannot be written or read ({_reason(str(error))}){advice}"
        ) from error


def _reason(message: str) -> str:
    """Extracts what the operating system said from a long message of tensorstore."""
    said = [os.strerror(code) for code in errno.errorcode]
    return next((each for each in said if each in message), " ".join(message.split())[:200])
