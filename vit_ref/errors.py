"""The one family of errors that means "this input cannot be used".

Whatever derives from `InputError` says in one line what is wrong, where, and what to do about it. Command lines turn it
into exit code 2; a defect of the library itself is any other exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vit_ref.verify.results import CandidateReport


class InputError(ValueError):
    """Something that the person gave cannot be used."""


class ConfigError(InputError):
    """A configuration names something unknown or contradicts itself."""


class CheckpointError(InputError):
    """A checkpoint cannot be found, read or trusted."""


class Fault(NamedTuple):
    """One fault of a port: its kind, the tensor's name in the source, and what is wrong with it."""

    kind: str
    name: str
    detail: str


class MappingError(InputError):
    """Weights that do not fit the configuration; `str()` lists every fault by kind.

    Attributes:
      faults: every one of them.
      layout: the layout's name.
      path: the checkpoint's directory or file, where it is known.
    """

    def __init__(self, faults: Iterable[Fault], layout: str, path: Path | None = None):
        self.faults, self.layout, self.path = tuple(faults), layout, path
        counts = Counter(fault.kind for fault in self.faults)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        place = f"{path}: " if path else ""
        lines = [f"{place}the weights do not fit the configuration (layout {layout}): {summary}"]
        lines += [f"  {fault.kind}: {fault.name}: {fault.detail}" for fault in self.faults]
        if counts["unexpected"]:
            lines.append("  to leave unexpected tensors behind: --ignore PATTERN, or ignore=[PATTERN] in Python")
        super().__init__("\n".join(lines))


class CandidateError(InputError):
    """A candidate cannot be found, loaded, run or observed as declared."""

    @classmethod
    def raised(cls, name: str, what: str, error: BaseException) -> CandidateError:
        """Makes one line of an exception that a person's own code raised.

        Args:
          name: the candidate's.
          what: what was done with it.
          error: the exception.
        """
        return cls(f"{name}: {what} raised {type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return next(iter(str(error).strip().splitlines()), "")


class ReferenceUnavailableError(InputError):
    """The reference is not installed, or not in a version that has it."""


class UnsupportedByReferenceError(InputError):
    """The reference cannot do this: build the configuration, or go backward."""


class TruncatedError(InputError):
    """What was to be float64 is not: an oracle would be no oracle, and a candidate would not have been judged."""


class UndifferentiableError(InputError):
    """What has no gradients to compare, and can still be judged forward."""


class UnjudgedError(InputError):
    """Nobody can judge a port there.

    Args:
      what: the message, with "{place}" where the place is named.
      place: a site, or a gradient's name.
    """

    def __init__(self, what: str, place: str):
        super().__init__(what, place)

    def __str__(self) -> str:
        """The message."""
        what, place = self.args
        return str(what.format(place=place))

    def renamed(self, new: Callable[[str], str]) -> UnjudgedError:
        """The same of a place that has another name."""
        what, place = self.args
        return type(self)(what, new(place))


class ReferenceOverflowError(UnjudgedError):
    """The reference itself is not finite in the tested precision, where its error would allow any other."""


class OraclesDifferError(UnjudgedError):
    """The reference and the NumPy oracle, both in float64, are not the same formula."""


class PartlyJudgedError(InputError):
    """The forward pass was judged and nothing failed, and its gradients cannot be judged.

    Args:
      reason: why, and what to do.
      report: what was found. It has no gradients.
    """

    def __init__(self, reason: str, report: CandidateReport):
        super().__init__(reason)
        self.report = report


class UnbuildableError(InputError):
    """An implementation is installed, and cannot be got ready on this machine."""


class OutOfMemoryError(InputError):
    """Not even one image fits."""
