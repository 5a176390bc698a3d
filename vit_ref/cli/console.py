"""Output of the commands on a terminal: results in colour, lines about errors, and a progress bar."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.theme import Theme

from vit_ref.image_files import counted

if TYPE_CHECKING:
    from vit_ref.verify.results import CandidateReport


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

    Without it rich would end the process with exit code 1, which here means a failed check. It writes text as it is:
    rich would print "input:x: wrong" with a picture in place of the name.
    """

    def __init__(self, **options: Any):
        super().__init__(emoji=False, **options)

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


class Steps:
    """The steps of a run, as a bar shows them. Call it with the name of each step when the step begins.

    Args:
      bar: the bar.
      total: number of expected steps, or None if it is unknown.
    """

    def __init__(self, bar: Progress, total: int | None):
        self._bar, self._total, self._done = bar, total, 0
        self._task = bar.add_task("reading the checkpoint", total=total)

    def __call__(self, doing: str) -> None:
        """Shows the name of the next step."""
        # A verdict that needs a closer look takes more steps than expected.
        total = self._total and max(self._total, self._done + 1)
        self._bar.update(self._task, completed=self._done, description=doing, total=total)
        self._done += 1

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Hides the bar, so that it does not mix with lines that are printed within the context."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def say(self, line: str) -> None:
        """Prints a line above the bar. Without a bar it prints nothing, because nobody watches."""
        if not self._bar.disable:
            with self.hidden():
                say(line)


@contextlib.contextmanager
def show_progress(total: int | None) -> Iterator[Steps]:
    """Shows a bar with the name of the step. Without a terminal it shows nothing.

    Args:
      total: number of expected steps, or None if it is unknown.

    Yields:
      A function to call with the name of each step when the step begins.
    """
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Steps(bar, total)


class PrintedReport:
    """A report on a terminal or in a pipe. Each pass is printed as soon as it was compared, and nothing twice.

    Args:
      stderr: whether to print on standard error, because standard output takes a file.
      whole: whether to print the table of each pass.
      heading: the line above the report; "" for none.
    """

    def __init__(self, *, stderr: bool, whole: bool, heading: str = ""):
        self._console = Output(stderr=stderr, highlighter=Verdicts(), theme=THEME, soft_wrap=True, markup=False)
        self._whole, self._heading, self._sections = whole, heading, 0

    def show(self, report: CandidateReport, steps: Steps) -> None:
        """Prints the passes that were compared since the last call, above the bar."""
        with steps.hidden():
            self._show(report)

    def end(self, report: CandidateReport) -> None:
        """Prints the rest of the report."""
        from vit_ref.verify.report import closing

        self._show(report)
        self._console.print(closing(report))

    def _show(self, report: CandidateReport) -> None:
        from vit_ref.verify.report import sections

        texts = sections(report, whole=self._whole)
        for text in ([self._heading] if self._heading and not self._sections else []) + texts[self._sections :]:
            self._console.print(text)
        self._sections = len(texts)
