"""Handling of an interrupt while modules are being imported, which takes seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
MESSAGE = "vit-ref: interrupted; no file is half-written"


@contextlib.contextmanager
def leave_when_interrupted() -> Iterator[None]:
    """Lets an interrupt end the process at once, with one line and exit code 130. Use it for imports only."""
    before = signal.getsignal(signal.SIGINT)
    # A process that a shell starts in the background ignores the signal.
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:  # pragma: no cover  # os._exit leaves without its coverage
    # A module that is being imported could catch an exception. A normal exit crashes while jaxlib compiles.
    sys.stderr.write(f"{MESSAGE}\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
