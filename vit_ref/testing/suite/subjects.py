"""The subjects of parity: embedded cases, and those given with --checkpoint and --candidate."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from pathlib import Path

import pytest
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.references.choice import REFERENCES
from vit_ref.verify.session import FORWARD
from vit_ref.weights import checkpoint
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.pretrained import read_configuration

# A backward pass takes long to compile, so these cases stand for all: the others have the same derivatives. FlaxViT
# does not support "rectangular-patch", and the NumPy oracle has no backward pass.
BACKWARD = ("rectangular", "hard-tokens", "no-qkv-bias", "one-head", "pooler")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The subject of a parity test: a candidate on a checkpoint.

    Attributes:
      name: its id.
      load: reads the configuration, the checkpoint and images.
      backward: whether to compare gradients, too.
      reference: the reference's name.
      embedded: the name of the embedded case; "" if the user gave the checkpoint.
      given: whether the user gave the checkpoint or the candidate.
      candidate: the candidate, as given; None for this package's own model.
      checkpoint: the path that the caller gave; None for an embedded case, or if a declared reference needs none.
    """

    name: str
    load: Callable[[], tuple[ViTConfig, Checkpoint, NDArray]]
    backward: bool
    reference: str
    embedded: str = ""
    given: bool = False
    candidate: str | None = None
    checkpoint: str | None = None

    @property
    def declared(self) -> bool:
        """Whether the caller declared the reference. Its model may be no ViT."""
        return self.reference not in REFERENCES


def find_subjects(config: pytest.Config) -> list[Subject]:
    """Returns the subjects that the options of a run select.

    Args:
      config: pytest's configuration.
    """
    option = partial(config.getoption, default=None)
    return _subjects(
        tuple(option("checkpoint") or ()),
        option("images"),
        tuple(option("candidate") or ()),
        option("reference") or "flax",
        bool(option("parity_report")),
    )


@lru_cache(maxsize=1)
def _subjects(
    checkpoints: tuple[str, ...], images: str | None, candidates: tuple[str, ...], reference: str, reports: bool
) -> list[Subject]:
    def load(path: str) -> tuple[ViTConfig, Checkpoint, NDArray]:
        source = checkpoint.read(path)
        config = read_configuration(source)
        return config, source, pixels_for(config, images, FORWARD)

    if reference not in REFERENCES:
        return [
            Subject(f"{base}-{name}" if base else name, _load_nothing, True, reference, "", True, candidate, path)
            for name, candidate in zip(_names(candidates, lambda path: Path(path).stem), candidates, strict=True)
            for base, path in _with_names(checkpoints)
        ]
    # A candidate reads the files itself, and a report names their digest.
    load_case = _load_written if candidates or reports else _load_case
    embedded = [
        Subject(name, partial(load_case, case), name in BACKWARD, reference, embedded=name)
        for name, case in CASES.items()
    ]
    names = _names(checkpoints, lambda path: Path(path).resolve().name, CASES)
    given = [
        Subject(name, partial(load, path), backward=True, reference=reference, given=True)
        for name, path in zip(names, checkpoints, strict=True)
    ]
    if not candidates:
        return embedded + given
    # With candidates, this package's own model is not verified.
    return [
        dataclasses.replace(subject, name=f"{subject.name}-{name}", given=True, candidate=candidate)
        for name, candidate in zip(_names(candidates, lambda path: Path(path).stem), candidates, strict=True)
        for subject in given or embedded
    ]


def _with_names(checkpoints: tuple[str, ...]) -> list[tuple[str, str | None]]:
    names = _names(checkpoints, lambda path: Path(path).resolve().name)
    return list(zip(names, checkpoints, strict=True)) or [("", None)]


def _load_nothing() -> tuple[ViTConfig, Checkpoint, NDArray]:
    raise AssertionError("a declared reference loads by itself")


def _names(given: tuple[str, ...], short: Callable[[str], str], taken: Iterable[str] = ()) -> list[str]:
    """Returns a short and unique name for each given value. Reports and files use these names."""
    shortened = [short(path) for path in given]
    count = Counter([*shortened, *taken])
    return [
        name if count[name] == 1 else f"{position}-{re.sub(r'[/:]', '-', path.strip('./'))}"
        for position, (name, path) in enumerate(zip(shortened, given, strict=True), start=1)
    ]


def _load_case(case: Case) -> tuple[ViTConfig, Checkpoint, NDArray]:
    return case.config, case.checkpoint(), case.images()


def _load_written(case: Case) -> tuple[ViTConfig, Checkpoint, NDArray]:
    return case.config, _written(case), case.images()


@cache
def _written(case: Case) -> Checkpoint:
    """Writes an embedded case's checkpoint to a directory of its own."""
    return case.write(Path(_scratch().name) / case.name)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vit-ref-")


def remove_written() -> None:
    """Removes what `_written` wrote. Without this it would stay until the process ends."""
    if _scratch.cache_info().currsize:
        _scratch().cleanup()
        _scratch.cache_clear()
        _written.cache_clear()
