"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, beside `path`, which takes its place once all of it is written; on an error nothing changes.

    Raises:
      OSError: nothing can be written there.
    """
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as stage:
        staged = Path(stage, path.name)
        yield staged
        os.replace(staged, path)
