"""The embedded case that commands use if the caller gives no checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Rectangular images, and odd sizes everywhere.
CASE = "rectangular"


@contextlib.contextmanager
def open_checkpoint(checkpoint: str | None) -> Iterator[str | Path]:
    """Yields the checkpoint, or a temporary directory that holds the embedded case.

    Reports name a directory by the last two parts of its path.
    """
    if checkpoint is not None:
        yield checkpoint
        return
    from vit_ref.verify.cases import CASES

    with tempfile.TemporaryDirectory(prefix="vit-ref-") as scratch:
        yield CASES[CASE].write(Path(scratch, "embedded", CASE)).path
