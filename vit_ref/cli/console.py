"""Output of the commands on a terminal: results in colour, lines about errors, and a progress bar."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePath

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.theme import Theme

from vit_ref.image_files import counted


class Verdicts(RegexHighlighter):
    """Highlighter of the words that state a verdict. Only terminals show the colours."""

    base_style = "verdict."
    highlights = [  # noqa: RUF012  # rich's own way
        r"(?P<good>\bpass(es|ed)?\b)",
        r"(?P<bad>\b(first divergence|failed|FAILED|stale expectation|both|rounding$|float64$)\b)",
        r"(?P<open>\b(not observed|expected failure|likely cause)\b)",
    ]


THEME = Theme({"verdict.good": "green", "verdict.bad": "bold red", "verdict.open": "yellow"})


class Output(Console):
    """Console that leaves a closed pipe to the command group.

    Without it rich would end the process with exit code 1, which here means a failed check.
    """

    def on_broken_pipe(self) -> None:
        """Raises again the error that rich is handling."""
        raise


_ERRORS = Output(stderr=True, soft_wrap=True, highlight=False)


def say(line: str) -> None:
    """Prints a line about the command itself on standard error."""
    _ERRORS.print(f"vit-ref: {line}", markup=False)


class Notes(logging.Handler):
    """Log handler that prints the package's log records as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        say(record.getMessage())


def say_left_out(files: Collection[PurePath | str]) -> None:
    """Prints how many files the command left out because their suffix is not that of an image."""
    if files:
        say(f"left out, because the suffix is not that of an image: {counted(files)}")


@contextlib.contextmanager
def show_progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """Shows a bar with the name of the step. Without a terminal it shows nothing.

    Args:
      total: number of expected steps, or None if it is unknown.

    Yields:
      A function to call with the name of each step when the step begins.
    """
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the checkpoint", total=total)
        done = 0

        def step(doing: str) -> None:
            nonlocal done
            # A verdict that needs a closer look takes more steps than expected.
            bar.update(task, completed=done, description=doing, total=total and max(total, done + 1))
            done += 1

        yield step
