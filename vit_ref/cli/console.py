"""What the commands say on a terminal: results in colour, lines about errors, and a progress bar."""

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
    """Colours the words that decide, where a terminal shows them."""

    base_style = "verdict."
    highlights = [  # noqa: RUF012  # rich's own way
        r"(?P<good>\bpass(es|ed)?\b)",
        r"(?P<bad>\b(first divergence|failed|FAILED|stale expectation|both|rounding$|float64$)\b)",
        r"(?P<open>\b(not observed|expected failure|likely cause)\b)",
    ]


THEME = Theme({"verdict.good": "green", "verdict.bad": "bold red", "verdict.open": "yellow"})


class Output(Console):
    """A console that leaves a closed pipe to the group: rich would end with exit code 1, which here is a verdict."""

    def on_broken_pipe(self) -> None:
        """Raises the error that rich is handling."""
        raise


_ERRORS = Output(stderr=True, soft_wrap=True, highlight=False)


def say(line: str) -> None:
    """Prints a line of the command itself, on standard error."""
    _ERRORS.print(f"vit-ref: {line}", markup=False)


class Notes(logging.Handler):
    """Shows what the package logs as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line."""
        say(record.getMessage())


def say_left_out(files: Collection[PurePath | str]) -> None:
    """Counts the files that were not taken for images, so that nobody misses theirs in silence."""
    if files:
        say(f"left out, no image by its suffix: {counted(files)}")


@contextlib.contextmanager
def show_progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal, which names the step; nothing without a terminal.

    Args:
      total: how many steps are expected; None if nobody knows.

    Yields:
      A function that is told the name of each step as it begins.
    """
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the checkpoint", total=total)
        done = 0

        def step(doing: str) -> None:
            nonlocal done
            # There are more steps than expected if the verdict takes a closer look.
            bar.update(task, completed=done, description=doing, total=total and max(total, done + 1))
            done += 1

        yield step
