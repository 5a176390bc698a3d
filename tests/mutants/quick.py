"""Runs only the tests that kill the bugs of the catalogue.

It takes pytest's arguments: python -m tests.mutants.quick -n 2
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.mutants.killing import ALIVE
from tests.mutants.mutant import Parity


def arguments() -> list[str]:
    """Returns pytest's arguments: the files, and an expression that selects their tests."""
    chosen = {each.tests.tests if isinstance(each.tests, Parity) else each.tests for each in ALIVE}
    # An expression selects tests of its own file only; the name of a file is a keyword of its tests.
    named = sorted(f"({Path(file).name} and ({expression}))" for file, _, expression in chosen)
    return [*sorted({file for file, _, _ in chosen}), "-k", " or ".join(named)]


if __name__ == "__main__":
    # It needs a new process: pytest rewrites assertions only in modules that are not imported yet.
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", *arguments(), *sys.argv[1:]]))
