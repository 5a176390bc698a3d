"""The proposed tables of a candidate, as data and as Python code to paste."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from vit_ref.verify.candidates.declaration import Mapped, Target
from vit_ref.verify.proposals.matching import CLOSE, EQUAL, Match
from vit_ref.verify.proposals.readings import evaluate

# The width of the printed lines, and how many keys with the same value a remark names.
_WIDTH, _NAMED = 120, 3


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Proposed tables, for a person to check. `str()` is Python code that makes them, with remarks.

    Attributes:
      candidate: the candidate's name.
      checkpoint: the checkpoint's name.
      site_matches: the value that shows each site, in the order of the sites.
      parameter_matches: the candidate's parameter for each parameter, in order.
      unshown: sites that no value shows.
      unowned: parameters that none of the candidate's equals.
      ambiguous: parameters that several of the candidate's equal, with those.
      unused: submodules and named values of the candidate that match nothing.
      unused_parameters: the candidate's parameters that match nothing.
      repeated: submodules and named values that were met more than once. No table can tell these times apart.
      diverges: the first site whose match is not equal; "" if all are equal.
    """

    candidate: str
    checkpoint: str
    site_matches: tuple[Match, ...]
    parameter_matches: tuple[Match, ...]
    unshown: tuple[str, ...]
    unowned: tuple[str, ...]
    ambiguous: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]
    unused_parameters: tuple[str, ...]
    repeated: tuple[str, ...]
    diverges: str

    @property
    def sites(self) -> Mapped:
        """The table of sites, for `Candidate.sites`."""
        return _table(self.site_matches)

    @property
    def parameters(self) -> Mapped:
        """The table of parameters, for `Candidate.parameters`."""
        return _table(self.parameter_matches)

    def to_json(self) -> dict[str, Any]:
        """Returns the proposal for machines. A selection is a Python expression of `x`, or None."""
        return {
            "candidate": self.candidate,
            "checkpoint": self.checkpoint,
            "sites": [_match_to_json(match) for match in self.site_matches],
            "parameters": [_match_to_json(match) for match in self.parameter_matches],
            "unshown": self.unshown,
            "unowned": self.unowned,
            "ambiguous": self.ambiguous,
            "unused": self.unused,
            "unused_parameters": self.unused_parameters,
            "repeated": self.repeated,
            "diverges": self.diverges or None,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"# Proposed for {self.candidate} from its values on {self.checkpoint}."
        yield "# Check each line: a candidate is verified at the sites that its table names."
        if self.diverges:
            yield f"# From {self.diverges} on the values differ: the candidate is wrong there, or the line below is."
        yield from _code("sites", self.site_matches)
        yield from _code("parameters", self.parameter_matches)
        yield from _comment("Sites without a value in the candidate", self.unshown)
        yield from _comment("Values of the candidate that match no site", self.unused)
        yield from _comment("Values of the candidate met more than once, so no table can name them", self.repeated)
        yield from _comment("Parameters of the checkpoint without an equal in the candidate", self.unowned)
        for target, keys in self.ambiguous.items():
            yield from _comment(f"Several parameters of the candidate equal {target}, choose one", keys)
        yield from _comment("Parameters of the candidate without an equal in the checkpoint", self.unused_parameters)


def _match_to_json(match: Match) -> dict[str, Any]:
    return {
        "key": match.reading.key,
        "target": match.target,
        "select": match.reading.select or None,
        "equal": max(match.errors) <= EQUAL,
    }


def _by_key(matches: Sequence[Match]) -> dict[str, list[Match]]:
    grouped: dict[str, list[Match]] = {}
    for match in matches:
        grouped.setdefault(match.reading.key, []).append(match)
    return grouped


def _table(matches: Sequence[Match]) -> Mapped:
    def target(match: Match) -> Target:
        select = match.reading.select
        return (match.target, evaluate(select)) if select else match.target

    grouped = {key: [target(match) for match in group] for key, group in _by_key(matches).items()}
    return {key: targets if len(targets) > 1 else targets[0] for key, targets in grouped.items()}


def _code(name: str, matches: Sequence[Match]) -> Iterator[str]:
    yield f"{name} = {{"
    for key, group in _by_key(matches).items():
        if len(group) == 1:
            yield from _entry(f"    {json.dumps(key)}: ", group[0])
            continue
        yield f"    {json.dumps(key)}: ["
        for match in group:
            yield from _entry("        ", match)
        yield "    ],"
    yield "}"


def _entry(start: str, match: Match) -> Iterator[str]:
    target, select = json.dumps(match.target), match.reading.select
    line = f"{start}({target}, lambda x: {select})," if select else f"{start}{target},"
    remark = "; ".join(_remarks(match))
    if remark and len(f"{line}  # {remark}") > _WIDTH:
        indent = " " * (len(start) - len(start.lstrip()))
        yield from textwrap.wrap(remark, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        remark = ""
    yield f"{line}  # {remark}" if remark else line


def _remarks(match: Match) -> Iterator[str]:
    wrong = [i for i, error in enumerate(match.errors) if error > EQUAL]
    if wrong:
        blocks = len(match.errors)
        where = f" in block {', '.join(map(str, wrong))}" if len(wrong) < blocks else ""
        if where and wrong == list(range(wrong[0], blocks)):
            where = f" from block {wrong[0]} on"
        near = "close, not equal" if max(match.errors) <= CLOSE else "not equal"
        yield f"{near}{where} ({max(match.errors):.0e}){', matched by its parameters' if match.by_place else ''}"
        for i, key in match.instead:
            yield f"{key} is equal in block {i}"
    if match.also:
        more = f" and {len(match.also) - _NAMED} more" if len(match.also) > _NAMED else ""
        yield f"same value as {', '.join(match.also[:_NAMED])}{more}"


def _comment(title: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield from textwrap.wrap(f"{title}: {', '.join(names)}", _WIDTH, initial_indent="# ", subsequent_indent="#   ")
