"""The installed command `vit-ref`. It answers an interrupt even while it still imports modules."""

from __future__ import annotations

from typing import Any

from vit_ref.cli.interrupts import leave_when_interrupted


def main() -> Any:
    """Imports the command line and runs it."""
    with leave_when_interrupted():
        from vit_ref.cli.commands import main as command
    return command()
