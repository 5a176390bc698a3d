"""A proposal: the tables of a candidate as they are found, and as the Python code that a person pastes."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from vit_ref.verify.candidates.declaration import Mapped, Target
from vit_ref.verify.proposals.matching import CLOSE, EQUAL, Match
from vit_ref.verify.proposals.readings import evaluate

# The width of the printed lines, and how many keys with the same value are named.
_WIDTH, _NAMED = 120, 3


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Tables to be checked by a person. `str()` is Python code that makes them, with all that is to be known of it.

    Attributes:
      candidate: the port's name.
      checkpoint: the checkpoint's.
      site_matches: what shows the sites, in their order.
      parameter_matches: what the parameters are, in their order.
      unshown: sites that nothing shows.
      unowned: parameters that nothing is.
      ambiguous: of those, parameters that several of the port's could be.
      unused: submodules and named values of the port that match nothing.
      unused_parameters: the port's parameters that match nothing.
      repeated: submodules and named values that came more than once, which no table can tell apart.
      diverges: the first site whose match is not equal; "" where all are.
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
        """All of it, for machines. A selection is the Python expression of `x` that makes it, or None."""
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
        yield f"# Proposed for {self.candidate} by its values on {self.checkpoint}."
        yield "# Check each line: a port is judged at the points that its table names."
        if self.diverges:
            yield f"# The port differs from {self.diverges} on, or what is said below not to be equal is not that site."
        yield from _code("sites", self.site_matches)
        yield from _code("parameters", self.parameter_matches)
        yield from _comment("Sites that nothing shows", self.unshown)
        yield from _comment("Of the port, and like no site", self.unused)
        yield from _comment("Of the port, and of no use because they ran more than once", self.repeated)
        yield from _comment("Parameters with no equal in the port", self.unowned)
        for target, keys in self.ambiguous.items():
            yield from _comment(f"Which of these is {target} its value does not tell", keys)
        yield from _comment("Parameters of the port with no equal in the checkpoint", self.unused_parameters)


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
        yield f"{near}{where} ({max(match.errors):.0e}){', told by its parameters' if match.by_place else ''}"
        for i, key in match.instead:
            yield f"equal in block {i} is {key}"
    if match.also:
        more = f" and {len(match.also) - _NAMED} more" if len(match.also) > _NAMED else ""
        yield f"the same as {', '.join(match.also[:_NAMED])}{more}"


def _comment(title: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield from textwrap.wrap(f"{title}: {', '.join(names)}", _WIDTH, initial_indent="# ", subsequent_indent="#   ")
