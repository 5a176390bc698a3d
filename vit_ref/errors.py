"""The exceptions that mean "this input cannot be used".

Each class derived from `InputError` says in its message what is wrong, where, and what to do. The commands turn it into
exit code 2. Any other exception is a defect of this package.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vit_ref.verify.results import CandidateReport


class InputError(ValueError):
    """Input that cannot be used."""


class ConfigError(InputError):
    """Configuration that names something unknown or contradicts itself."""


class CheckpointError(InputError):
    """Checkpoint that cannot be found, read or trusted."""


class Fault(NamedTuple):
    """Fault of a checkpoint's weights: its kind, the name of the tensor in the source, and what is wrong with it."""

    kind: str
    name: str
    detail: str


class MappingError(InputError):
    """Weights that do not fit the configuration. The message lists every fault by kind.

    Attributes:
      faults: all faults.
      layout: name of the layout.
      path: directory or file of the checkpoint, or None if it is unknown.
    """

    def __init__(self, faults: Iterable[Fault], layout: str, path: Path | None = None):
        self.faults, self.layout, self.path = tuple(faults), layout, path
        counts = Counter(fault.kind for fault in self.faults)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        place = f"{path}: " if path else ""
        lines = [f"{place}the weights do not fit the configuration (layout {layout}): {summary}"]
        lines += [f"  {fault.kind}: {fault.name}: {fault.detail}" for fault in self.faults]
        if counts["unexpected"]:
            lines.append("  to leave out unexpected tensors: --ignore PATTERN, or ignore=[PATTERN] in Python")
        super().__init__("\n".join(lines))


class CandidateError(InputError):
    """Candidate that cannot be found, loaded, run or observed as its declaration says."""

    @classmethod
    def raised(cls, name: str, what: str, error: BaseException) -> CandidateError:
        """Makes one line of an exception that a candidate's own code raised, with the place in that code.

        Args:
          name: name of the candidate.
          what: the action that raised.
          error: the exception.
        """
        place = find_line(error)
        return cls(f"{name}: {what} raised {type(error).__name__}: {first_line(error)}{place and f' ({place})'}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or "" if it has none."""
    return next(iter(str(error).strip().splitlines()), "")


def find_line(error: BaseException) -> str:
    """Returns the last line that an exception passed in a person's own file, such as "my_port.py, line 41".

    A file is a person's own unless it is installed, is Python's or is this package's.

    Args:
      error: the exception.

    Returns:
      The line, or "" if there is none. A syntax error says itself which line it is in.
    """
    if isinstance(error, SyntaxError):
        return ""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(Path(file).name, line) for file, line in lines if _is_own(file)]
    return f"{own[-1][0]}, line {own[-1][1]}" if own else ""


# The directories of this package and of Python's standard library.
_NOT_OWN = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, os.__file__))


def _is_own(file: str) -> bool:
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return not installed and not file.startswith(("<", *_NOT_OWN))


class ReferenceUnavailableError(InputError):
    """Reference that is not installed, or not in a version that this package knows."""


class UnsupportedByReferenceError(InputError):
    """Request that the reference cannot fulfil: to build the configuration, or to compute gradients."""


class TruncatedError(InputError):
    """Value that should be float64 and is not. With it, an oracle or a candidate would prove nothing."""


class UndifferentiableError(InputError):
    """Candidate without gradients to compare. Its forward pass can still be compared."""


class UnjudgedError(InputError):
    """Site or gradient at which no candidate can be judged.

    Args:
      what: the message, with "{place}" for the name of the place.
      place: name of the site or gradient.
    """

    def __init__(self, what: str, place: str):
        super().__init__(what, place)

    def __str__(self) -> str:
        """Returns the message."""
        what, place = self.args
        return str(what.format(place=place))

    def renamed(self, new: Callable[[str], str]) -> UnjudgedError:
        """Returns the same error for a place with another name."""
        what, place = self.args
        return type(self)(what, new(place))


class ReferenceOverflowError(UnjudgedError):
    """Reference that is not finite in float64 or in the tested precision. No error can be measured by it there."""


class OraclesDifferError(UnjudgedError):
    """Reference and NumPy oracle that differ in float64, so they do not compute the same formula."""


class PartlyJudgedError(InputError):
    """Candidate whose forward pass passed every check and whose gradients cannot be judged.

    Args:
      reason: why, and what to do.
      report: the report of the forward pass.
    """

    def __init__(self, reason: str, report: CandidateReport):
        super().__init__(reason)
        self.report = report


class UnbuildableError(InputError):
    """Implementation that is installed and cannot be prepared on this machine."""


class OutOfMemoryError(InputError):
    """Device memory that is too small for one image."""
