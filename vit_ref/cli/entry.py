"""The installed command `vit-ref`: it answers an interrupt while the package is being imported, which takes seconds.

Importing any module of the package imports jax and flax, so this module stands outside of it.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

INTERRUPTED = 130


def main() -> Any:
    """Imports the command line and runs it."""
    before = signal.getsignal(signal.SIGINT)
    # A shell has what it starts in the background ignore the signal.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from vit_ref.cli.commands import main as command

    signal.signal(signal.SIGINT, before)
    return command()


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception could end in an `except` of whatever is being imported, and Python's own end takes jaxlib down.
    sys.stderr.write("vit-ref: interrupted, nothing is left half-written\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
