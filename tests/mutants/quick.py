"""Runs the tests by which the bugs of the catalogue are killed, and no others.

With pytest's arguments: python -m tests.mutants.quick -n 2
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.mutants.killing import ALIVE
from tests.mutants.mutant import Parity


def arguments() -> list[str]:
    """pytest's arguments: the files, and which tests of them."""
    chosen = {each.tests.tests if isinstance(each.tests, Parity) else each.tests for each in ALIVE}
    # An expression means tests of its own file; a file's name is a keyword of its tests.
    named = sorted(f"({Path(file).name} and ({expression}))" for file, _, expression in chosen)
    return [*sorted({file for file, _, _ in chosen}), "-k", " or ".join(named)]


if __name__ == "__main__":
    # A process of its own: pytest rewrites assertions of what is not imported yet.
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", *arguments(), *sys.argv[1:]]))
