"""A run's checkpoints, by Orbax: asynchronous, atomic, the last few and the best."""

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

# What Orbax and tensorstore raise of a full disk, one that cannot be written to, or damaged files is not OSError alone.
_DISK = (OSError, ValueError, RuntimeError, KeyError, TypeError)

_DAMAGED = ": remove it, and --resume goes on from the one before"


class Progress(NamedTuple):
    """Where a run is, besides its arrays.

    Attributes:
      step: how many steps are done.
      loader: the loader's state, as JSON takes it.
      accuracy: on the validation images, where they were just looked at, with the loss there.
    """

    step: int
    loader: Any
    accuracy: tuple[float, float] | None = None


class Saves:
    """The checkpoints in one directory.

    Args:
      directory: made if need be.
      keep: how many of the last to keep, besides the best.

    Raises:
      InputError: it cannot be written to.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory, self._keep = directory.absolute(), keep
        with _one_line(self._directory):
            self._end_deletions()
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    # Left by a process that was killed while it wrote.
                    cleanup_tmp_directories=True,
                ),
            )
        # Orbax's own policy of the best knows nothing of a former process: resumed, it would delete the best so far.
        self._ranks = {step: _rank(self.progress(step)) for step in self._manager.all_steps()}

    def _end_deletions(self) -> None:
        """Of a checkpoint that a process was deleting when it was killed, its progress may be gone, and so is the rest.

        One that was written whole has it: it comes under its name at once. Of the last nothing is deleted.
        """
        if jax.process_index() or not self._directory.is_dir():
            return
        steps = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
        for step in steps[:-1]:
            progress = self._directory / str(step) / "progress"
            if not (progress.is_dir() and any(progress.iterdir())):
                shutil.rmtree(progress.parent)

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Which to keep: the last few and the best. Orbax asks, after each checkpoint."""
        steps = [each.step for each in checkpoints]
        kept = {*steps[-self._keep :], self._best_of(steps)}
        return [step in kept for step in steps]

    def _best_of(self, steps: Iterable[int]) -> int | None:
        ranked = {step: rank for step in steps if (rank := self._ranks[step])}
        return max(ranked, key=ranked.__getitem__, default=None)

    def save(self, arrays: Mapping[str, jax.Array], progress: Progress) -> None:
        """Writes a checkpoint in the background; the arrays may be overwritten once this returns.

        Raises:
          InputError: this one, or the one before it, cannot be written.
        """
        self._require_space(sum(array.nbytes for array in arrays.values()))
        # The step after this one is given the arrays' memory while they are being written.
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
        """Before anything is written: tensorstore, out of space, prints pages from threads of its own."""
        with _one_line(self._directory):
            free = shutil.disk_usage(self._directory).free
        if free < size:
            raise InputError(
                f"{self._directory}: a checkpoint takes {size / 2**20:,.0f} MiB, the disk has {free / 2**20:,.0f} left:"
                " make room and go on with --resume"
            )

    def latest(self) -> int | None:
        """The last step that was written whole, None where there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest accuracy, the lowest loss among equals; None where none was measured."""
        return self._best_of(self._manager.all_steps())

    def progress(self, step: int) -> Progress:
        """What was saved beside the arrays.

        Raises:
          InputError: it cannot be read.
        """
        with _one_line(self._directory / str(step), _DAMAGED):
            read = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
            accuracy = tuple(read["accuracy"]) if read["accuracy"] else None
            return Progress(read["step"], read["loader"], accuracy)

    def restore(self, step: int, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The arrays of a step, each with the shape, dtype and sharding of its like.

        Raises:
          InputError: they cannot be read, or are of another model.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
        with _one_line(self._directory / str(step), _DAMAGED):
            return self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes)))[
                "arrays"
            ]

    def wait(self) -> None:
        """Until everything is written.

        Raises:
          InputError: something could not be.
        """
        with _one_line(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and stops the threads."""
        with _one_line(self._directory):
            self._manager.close()


def _rank(progress: Progress) -> tuple[float, float] | None:
    return progress.accuracy and (progress.accuracy[0], -progress.accuracy[1])


@contextlib.contextmanager
def _one_line(place: Path, advice: str = "") -> Iterator[None]:
    try:
        yield
    except _DISK as error:
        raise InputError(f"{place}: checkpoint cannot be written or read ({_reason(str(error))}){advice}") from error


def _reason(message: str) -> str:
    """What the operating system said, which tensorstore buries in names and numbers of its own."""
    said = [os.strerror(code) for code in errno.errorcode]
    return next((each for each in said if each in message), " ".join(message.split())[:200])
