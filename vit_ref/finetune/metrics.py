"""Results of an evaluation, and the log of a run as lines of JSON."""

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

# The label and the index of the rows that fill up a last batch. They are no images.
PADDING = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions of a classifier for labelled images. Batches add up: `sum(batches, start=Evaluation.empty(classes))`.

    Attributes:
      confusion: (classes, classes), int64. Row i, column j counts the images of class i that the model took for j.
      total_loss: the sum of the images' cross-entropies, or NaN if only the predicted classes are known.
    """

    confusion: NDArray
    total_loss: float

    @classmethod
    def empty(cls, classes: int) -> Evaluation:
        """Returns the evaluation of no image."""
        return cls(np.zeros((classes, classes), np.int64), 0.0)

    @classmethod
    def of_logits(cls, logits: ArrayLike, labels: ArrayLike) -> Evaluation:
        """Evaluates one batch from its logits.

        Args:
          logits: (B, classes), of any floating dtype. The loss is computed from them in float64.
          labels: class ids (B,), integers. Images with label -1 are left out.

        Raises:
          InputError: a label is not one of the classes.
        """
        scores, truth = np.asarray(logits).astype(np.float64), np.asarray(labels)
        evaluation = cls.of_predicted(scores.argmax(-1), truth, scores.shape[1])
        scores, truth = scores[truth != PADDING], truth[truth != PADDING]
        # A run that diverged shows that in its loss, and not in a warning of NumPy.
        with np.errstate(invalid="ignore"):
            shifted = scores - scores.max(-1, keepdims=True)
            losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(truth)), truth]
        return dataclasses.replace(evaluation, total_loss=float(losses.sum()))

    @classmethod
    def of_predicted(cls, predicted: ArrayLike, labels: ArrayLike, classes: int) -> Evaluation:
        """Evaluates one batch from its predicted classes. The loss is NaN.

        Args:
          predicted: class ids (B,), integers.
          labels: class ids (B,), integers. Images with label -1 are left out.
          classes: number of classes.

        Raises:
          InputError: a label is not one of the classes.
        """
        truth = np.asarray(labels)
        taken_for, truth = np.asarray(predicted)[truth != PADDING], truth[truth != PADDING]
        strange = truth[(truth < 0) | (truth >= classes)].tolist()
        if strange:
            raise InputError(
                f"an image's label is {strange[0]}: give labels from 0 to {classes - 1}, the model's classes"
            )
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (truth, taken_for), 1)
        return cls(confusion, math.nan)

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.confusion + other.confusion, self.total_loss + other.total_loss)

    @property
    def images(self) -> int:
        """The number of evaluated images."""
        return int(self.confusion.sum())

    @property
    def loss(self) -> float:
        """The mean cross-entropy, or NaN without an image."""
        return self.total_loss / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """The share of images whose class the model predicted, or NaN without an image."""
        return int(self.confusion.trace()) / self.images if self.images else math.nan

    @property
    def per_class(self) -> NDArray:
        """The accuracy on the images of each class, (classes,), float64. NaN for a class without an image."""
        return np.diagonal(self.shares)

    @property
    def shares(self) -> NDArray:
        """`confusion` with each row divided by its sum, float64. NaN for a class without an image."""
        images = self.confusion.sum(axis=1, keepdims=True)
        return np.divide(self.confusion, images, out=np.full(self.confusion.shape, np.nan), where=images > 0)


class MetricsLog:
    """Log of JSON lines, one object a line. It flushes each line when it writes it.

    A run that was killed may leave an unfinished last line. Opening the log drops that line.

    Args:
      path: the file. It is made if it does not exist.
      tensorboard: a directory in which TensorBoard finds the same numbers by "step", or None.

    Raises:
      InputError: the file cannot be read or written, a finished line is no JSON object, or tensorboardX is missing.
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
            raise InputError(f"{self.path}: it cannot be written ({error.strerror}): give another place") from None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends one object.

        Args:
          entry: name -> string, number, array, or list of these. `truncate_after` reads "step". A value that is not
            finite becomes null, because JSON has no other name for it.

        Raises:
          InputError: the file cannot be written, for example on a full disk.
        """
        plain = _plain(entry)
        try:
            self._stream.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise InputError(f"{self.path}: it cannot be written ({error.strerror}): give another place") from None
        if self._writer is not None and "step" in plain:
            for name, value in plain.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, plain["step"])
            self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the lines whose "step" is greater. A run that resumes there writes them again.

        The log writes the file under a temporary name and renames it. It tells TensorBoard to forget later steps.

        Args:
          step: the last step to keep.

        Raises:
          InputError: the file cannot be read or written, or a finished line is no JSON object.
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
    """Reads the objects of a file that `MetricsLog` wrote, in order. It leaves out an unfinished last line.

    Raises:
      InputError: the file does not exist, or a finished line is no JSON object.
    """
    return [json.loads(line) for line in _lines(Path(path))]


def _lines(path: Path) -> list[bytes]:
    try:
        # The bytes after the last line end are an unfinished line, or nothing.
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: it cannot be read ({error.strerror}): give another file") from None
    for number, line in enumerate(lines, start=1):
        try:
            sound = isinstance(json.loads(line), dict)
        except ValueError:
            sound = False
        if not sound:
            raise InputError(f"{path}: line {number} is no JSON object: mend it, or remove the file")
    return lines


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites the file with the finished lines to keep. If they are all, it does not touch the file."""
    if not path.exists():
        return
    kept = b"".join(line + b"\n" for line in _lines(path) if keep(json.loads(line)))
    try:
        if kept != path.read_bytes():
            with replacing(path) as staged:
                staged.write_bytes(kept)
    except OSError as error:
        raise InputError(f"{path}: it cannot be written ({error.strerror}): give another place") from None


def _plain(value: Any) -> Any:
    """Returns the value in JSON's own types: arrays become lists, and values that are not finite become None."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
