"""What an evaluation finds, and the log of a run: JSON, a line at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vit_ref.errors import InputError
from vit_ref.extras import extra
from vit_ref.files import replacing

# The label, and the index, of what fills up a last batch: no image.
PADDING = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What a classifier does with labelled images. Batches add up: `sum(batches, start=Evaluation.empty(classes))`.

    Attributes:
      confusion: (classes, classes), int64: how many images of the class of the row were taken for that of the column.
      total_loss: the sum of the images' cross-entropies; NaN where only the predicted classes are known.
    """

    confusion: NDArray
    total_loss: float

    @classmethod
    def empty(cls, classes: int) -> Evaluation:
        """The evaluation of no image."""
        return cls(np.zeros((classes, classes), np.int64), 0.0)

    @classmethod
    def of_logits(cls, logits: ArrayLike, labels: ArrayLike) -> Evaluation:
        """The evaluation of one batch.

        Args:
          logits: (B, classes), of any floating dtype; the loss is computed from them in float64.
          labels: class ids (B,), integers; those that are -1 are left out.

        Raises:
          InputError: see `of_predicted`.
        """
        scores, truth = np.asarray(logits).astype(np.float64), np.asarray(labels)
        found = cls.of_predicted(scores.argmax(-1), truth, scores.shape[1])
        scores, truth = scores[truth != PADDING], truth[truth != PADDING]
        # A run that has diverged is to be seen in its loss, not in a warning of NumPy's.
        with np.errstate(invalid="ignore"):
            shifted = scores - scores.max(-1, keepdims=True)
            losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(truth)), truth]
        return dataclasses.replace(found, total_loss=float(losses.sum()))

    @classmethod
    def of_predicted(cls, predicted: ArrayLike, labels: ArrayLike, classes: int) -> Evaluation:
        """The evaluation of one batch whose logits are not known; its loss is NaN.

        Args:
          predicted: class ids (B,), integers.
          labels: class ids (B,), integers; those that are -1 are left out.
          classes: how many there are.

        Raises:
          InputError: a label is none of the classes.
        """
        truth = np.asarray(labels)
        taken_for, truth = np.asarray(predicted)[truth != PADDING], truth[truth != PADDING]
        strange = truth[(truth < 0) | (truth >= classes)].tolist()
        if strange:
            raise InputError(f"an image's label is {strange[0]}, the model has classes 0 to {classes - 1}")
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (truth, taken_for), 1)
        return cls(confusion, math.nan)

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.confusion + other.confusion, self.total_loss + other.total_loss)

    @property
    def images(self) -> int:
        """How many images were evaluated."""
        return int(self.confusion.sum())

    @property
    def loss(self) -> float:
        """Mean cross-entropy; NaN without an image."""
        return self.total_loss / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """The share of the images that were taken for what they are; NaN without an image."""
        return int(self.confusion.trace()) / self.images if self.images else math.nan

    @property
    def per_class(self) -> NDArray:
        """The same for each class's own images, (classes,) of float64; NaN for a class without one."""
        return np.diagonal(self.shares)

    @property
    def shares(self) -> NDArray:
        """`confusion` with each row divided by its sum, float64; NaN for a class without an image."""
        images = self.confusion.sum(axis=1, keepdims=True)
        return np.divide(self.confusion, images, out=np.full(self.confusion.shape, np.nan), where=images > 0)


class MetricsLog:
    """Appends to a file of JSON lines, one object a line, each flushed when it is written.

    Opening it drops a last line that was not finished, as a killed run leaves it.

    Args:
      path: the file; made where it does not exist.
      tensorboard: a directory in which TensorBoard finds the same numbers, by their "step".

    Raises:
      InputError: the file cannot be read or written, a finished line of it is no JSON object, or tensorboardX is
        missing.
    """

    def __init__(self, path: str | os.PathLike[str], tensorboard: str | os.PathLike[str] | None = None):
        self.path = Path(path)
        self._tensorboard = None if tensorboard is None else os.fspath(tensorboard)
        self._open(lambda entry: True, purge_step=None)

    def _open(self, keep: Callable[[dict[str, Any]], bool], purge_step: int | None) -> None:
        _rewrite(self.path, keep)
        self._writer = None
        if self._tensorboard is not None:
            tensorboardx = extra("tensorboardX", "logging for TensorBoard", "tensorboard")
            self._writer = tensorboardx.SummaryWriter(self._tensorboard, purge_step=purge_step)
        try:
            self._stream = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends one object.

        Args:
          entry: strings, numbers, arrays and lists of these, by name. "step" is what `truncate_after` looks at. What is
            not finite is written as null, since JSON has no name for it.

        Raises:
          InputError: the file cannot be written, as on a full disk.
        """
        plain = _plain(entry)
        try:
            self._stream.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self._writer is not None and "step" in plain:
            for name, value in plain.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, plain["step"])
            self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the lines whose "step" is greater, which a run that is resumed there will write again.

        The file is rewritten under a temporary name and renamed. TensorBoard is told to forget what came later.

        Raises:
          InputError: see `MetricsLog`.
        """
        self.close()
        self._open(lambda entry: entry.get("step", step) <= step, purge_step=step + 1)

    def close(self) -> None:
        """Closes the files."""
        self._stream.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a file that `MetricsLog` wrote, in order, without a last line that was not finished.

    Raises:
      InputError: there is no such file, or a finished line of it is no JSON object.
    """
    return [json.loads(line) for line in _lines(Path(path))]


def _lines(path: Path) -> list[bytes]:
    try:
        # What follows the last line end is a line that was not finished, or nothing.
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        try:
            sound = isinstance(json.loads(line), dict)
        except ValueError:
            sound = False
        if not sound:
            raise InputError(f"{path}: line {number} is no JSON object: mend it, or remove the file")
    return lines


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves the finished lines that are to be kept; touches nothing where that is all."""
    if not path.exists():
        return
    kept = b"".join(line + b"\n" for line in _lines(path) if keep(json.loads(line)))
    try:
        if kept != path.read_bytes():
            with replacing(path) as staged:
                staged.write_bytes(kept)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def _plain(value: Any) -> Any:
    """The value in JSON's own types; arrays become lists, and None what is not finite."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
