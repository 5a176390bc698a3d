"""Does an evaluation equal counting, and does the log of a run survive a kill and a resume?"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.special import log_softmax

from vit_ref.errors import InputError
from vit_ref.finetune.metrics import Evaluation, MetricsLog, read_metrics

CLASSES = 7
# The same few additions in another order: a handful of roundings of float64.
ROUNDING = 16 * 2**-53


def batch(seed: int = 0, images: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and labels of six of the seven classes. A tenth of the labels is padding."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, images)
    logits = rng.normal(scale=2, size=(images, CLASSES))
    logits[np.arange(images), labels] += 2
    return logits, np.where(rng.random(images) < 0.1, -1, labels)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_an_evaluation_is_what_counting_gives(dtype: type) -> None:
    logits, labels = batch()
    logits = logits.astype(dtype)
    counted = np.zeros((CLASSES, CLASSES), np.int64)
    losses, right = [], []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        if label >= 0:
            counted[label, max(range(CLASSES), key=row.__getitem__)] += 1
            losses.append(-log_softmax(row)[label])
            right.append(row[label] == max(row))
    found = Evaluation.of_logits(jnp.asarray(logits) if dtype != np.float64 else logits, labels)
    assert (found.confusion == counted).all() and found.confusion.dtype == np.int64
    assert found.images == (labels >= 0).sum() < len(labels)
    assert found.accuracy == sum(right) / len(right)
    assert 0.3 < found.accuracy < 0.95
    assert abs(found.loss - math.fsum(losses) / len(losses)) <= ROUNDING * found.loss


def test_each_class_has_its_own_accuracy_and_none_without_images() -> None:
    logits, labels = batch()
    found = Evaluation.of_logits(logits, labels).per_class
    for label in range(CLASSES - 1):
        own = logits[labels == label].argmax(-1) == label
        assert found[label] == own.sum() / len(own)
    assert len(set(found[:-1])) > 3
    assert np.isnan(found[-1])


@pytest.mark.parametrize("size", [1, 7, 30])
def test_batches_add_up_to_the_whole(size: int) -> None:
    logits, labels = batch()
    whole = Evaluation.of_logits(logits, labels)
    parts = [Evaluation.of_logits(logits[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]
    summed = sum(parts, start=Evaluation.empty(CLASSES))
    assert (summed.confusion == whole.confusion).all()
    assert abs(summed.loss - whole.loss) <= 4 * ROUNDING * whole.loss


def test_predicted_classes_alone_give_the_counts_and_no_loss() -> None:
    logits, labels = batch()
    found = Evaluation.of_predicted(logits.argmax(-1), labels, CLASSES)
    assert (found.confusion == Evaluation.of_logits(logits, labels).confusion).all()
    assert math.isnan(found.loss)


def test_large_logits_do_not_overflow() -> None:
    assert Evaluation.of_logits(np.array([[1e5, 0.0], [0.0, 1e5]], np.float32), [0, 0]).loss == 5e4


@pytest.mark.parametrize(
    "evaluation",
    [
        lambda: Evaluation.empty(3),
        lambda: Evaluation.of_logits(np.zeros((2, 3)), [-1, -1]),
        lambda: Evaluation.of_logits(np.full((2, 3), np.nan), [0, 1]),
        lambda: Evaluation.of_logits(np.full((2, 3), np.inf), [0, 1]),
    ],
    ids=["empty", "padding", "nan", "inf"],
)
def test_what_has_no_loss_says_so_without_a_warning(evaluation: Callable[[], Evaluation]) -> None:
    found = evaluation()
    assert math.isnan(found.loss)
    assert math.isnan(found.accuracy) == (found.images == 0)


@pytest.mark.parametrize("label", [-2, CLASSES])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    with pytest.raises(
        InputError, match=rf"^an image's label is {label}: give labels from 0 to 6, the model's classes$"
    ):
        Evaluation.of_logits(np.zeros((2, CLASSES)), [3, label])


def write(path: Path, *steps: int) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / step})


def test_what_is_written_is_there_at_once_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": np.float32(0.5), "rate": jnp.float32(0.25), "name": "fünf"})
        log.write({"step": np.int64(2), "per_class": np.array([0.5, np.nan]), "loss": math.inf})
        assert read_metrics(path) == [
            {"step": 1, "loss": 0.5, "rate": 0.25, "name": "fünf"},
            {"step": 2, "per_class": [0.5, None], "loss": None},
        ]
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("torn", ["", '{"step": 8, "lo', '{"step": 8, "loss": 1.0}', '{"name": "f\udcc3'])
def test_a_resumed_run_leaves_the_log_of_an_uninterrupted_one(torn: str, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write(whole, *range(1, 10))
    write(resumed, *range(1, 8))
    with resumed.open("ab") as stream:
        stream.write(torn.encode(errors="surrogateescape"))
    assert [line["step"] for line in read_metrics(resumed)] == list(range(1, 8))
    with MetricsLog(resumed) as log:
        log.truncate_after(5)
        assert [line["step"] for line in read_metrics(resumed)] == list(range(1, 6))
    write(resumed, *range(6, 10))
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["resumed", "whole"]


def test_lines_without_a_step_outlive_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"classes": 4})
        log.write({"step": 3})
        log.truncate_after(2)
        log.write({"step": 3, "loss": 1})
    assert read_metrics(path) == [{"classes": 4}, {"step": 3, "loss": 1}]


def test_a_truncation_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with (
        MetricsLog(path) as log,
        pytest.raises(InputError, match=r"metrics.jsonl: it cannot be written \(No space left"),
    ):
        log.truncate_after(1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["[1]", "{'step': 2}", "", '{"step": 2'])
def test_a_finished_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for use in (read_metrics, MetricsLog):
        with pytest.raises(InputError, match=r"metrics.jsonl: line 2 is no JSON object: mend it, or remove the file$"):
            use(path)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: it cannot be read \(No such file or directory\): give another file$"):
        read_metrics(tmp_path / "none")
    with pytest.raises(
        InputError, match=r"log: it cannot be written \(No such file or directory\): give another place$"
    ):
        MetricsLog(tmp_path / "no" / "log")


def events(directory: Path) -> list:
    """Returns the events of all files in order: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(directory.iterdir()):
        raw = file.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            found.append(Event.FromString(raw[12 : 12 + length]))
            raw = raw[16 + length :]
    return found


def test_tensorboard_gets_the_numbers_and_forgets_repeated_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for first, last in ((1, 3), (2, 4)):
        with MetricsLog(tmp_path / "log", tensorboard=tmp_path / str(first)) as log:
            if first == 2:
                log.truncate_after(1)
            for step in range(first, last):
                log.write({"step": step, "loss": step / 4, "name": "text", "gone": math.nan})
    before, after = events(tmp_path / "1"), events(tmp_path / "2")
    scalars = [(e.step, v.tag, v.simple_value) for e in before + after for v in e.summary.value]
    assert scalars == [(1, "loss", 0.25), (2, "loss", 0.5), (2, "loss", 0.5), (3, "loss", 0.75)]
    # TensorBoard drops events at or after the step at which a session starts.
    assert [event.step for event in after if event.HasField("session_log")] == [2]


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"needs tensorboardX: pip install 'vit-ref\[tensorboard\]'$"):
        MetricsLog(tmp_path / "log", tensorboard=tmp_path)


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsLog(tmp_path / "a.jsonl") as log:
        stream = mock.Mock(wraps=log._stream, write=full)
        monkeypatch.setattr(log, "_stream", stream)
        with pytest.raises(InputError, match=r"a\.jsonl: it cannot be written \(No space left on device\)"):
            log.write({"step": 1})
