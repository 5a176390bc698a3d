"""Proposes the table of a candidate by running it beside a declared reference. Equal values are the same site."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.candidates.table import fitted
from vit_ref.verify.compare.trace import passing
from vit_ref.verify.gates import error
from vit_ref.verify.pairs.discovery import submodule_of
from vit_ref.verify.pairs.given import Given as GivenInputs
from vit_ref.verify.pairs.onward import Observed, look_past, size_of
from vit_ref.verify.pairs.outline import OUTPUT
from vit_ref.verify.pairs.session import Given, PairSession
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.proposals.matching import EQUAL
from vit_ref.verify.proposals.recording import Recorder

# With more axes there are too many orders to try.
_MOST_AXES = 4
# The numbers of equal parts that a fused value may have.
_PARTS = (1, 2, 3)


class Line(NamedTuple):
    """One line of a table.

    Attributes:
      key: the candidate's value, see `Candidate.sites`.
      site: the reference's site.
      select: the Python expression of `x` that picks the site's value; "" for the whole value.
      equal: whether the two values are equal. If not, the values after them are, given the reference's value.
      where: of a line with `{i}`, the values that differ if not all do.
    """

    key: str
    site: str
    select: str
    equal: bool = True
    where: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PairProposal:
    """A proposed table, for a person to check. `str()` is the Python code that makes it.

    Attributes:
      candidate: the candidate's name.
      reference: the reference's name.
      lines: the table.
      unshown: sites of the reference that no value of the candidate equals, in order.
      unused: submodules of the candidate that equal no site.
    """

    candidate: str
    reference: str
    lines: tuple[Line, ...]
    unshown: tuple[str, ...]
    unused: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the proposal for machines."""
        return {
            "candidate": self.candidate,
            "reference": self.reference,
            "sites": [
                {"key": line.key, "target": line.site, "select": line.select or None, "equal": line.equal}
                for line in self.lines
            ],
            "unshown": list(self.unshown),
            "unused": list(self.unused),
        }

    def __str__(self) -> str:
        return "\n".join(self._text())

    def _text(self) -> Iterator[str]:
        yield f"# Proposed for {self.candidate} by its values beside {self.reference}."
        yield "# Check each line: a candidate is compared at the points that its table names."
        if not all(line.equal for line in self.lines):
            yield "# A remark names each value that differs. Given the reference's value there, later ones are equal."
        # A selection that many lines share, as that of a model with another order of axes, is written once.
        shared = {
            select: f"pick_{k}"
            for k, (select, count) in enumerate(Counter(line.select for line in self.lines if line.select).items())
            if count > 1
        }
        for select, name in shared.items():
            yield f"{name} = lambda x: {select}"
        yield "sites = {"
        by_key: dict[str, list[str]] = {}
        for line in self.lines:
            by_key.setdefault(line.key, []).append(_target(line, shared))
        different = {line.key: line.where or (line.key,) for line in self.lines if not line.equal}
        for key, targets in by_key.items():
            if key in different:
                yield f"    # Differs from the reference: {', '.join(different[key])}"
            if len(targets) == 1:
                yield f"    {json.dumps(key)}: {targets[0]},"
            else:
                yield f"    {json.dumps(key)}: ["
                yield from (f"        {target}," for target in targets)
                yield "    ],"
        yield "}"
        if self.unshown:
            yield f"# Sites that nothing equals: {', '.join(self.unshown)}"
        if self.unused:
            yield f"# Values of the candidate that equal no site: {', '.join(self.unused)}"


def propose(
    reference: Given,
    candidate: Given,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    inputs: GivenInputs = None,
    seed: int = 0,
) -> PairProposal:
    """Proposes the table of a candidate's sites from runs in float64 beside the reference.

    The first run shows which values are equal. If a value is wrong, later runs give the candidate the reference's value
    there, so that the table does not end at the first wrong formula.

    Args:
      reference: see `compare`.
      candidate: see `compare`. Its own table is ignored.
      checkpoint: see `compare`.
      inputs: see `compare`.
      seed: see `compare`.

    Raises:
      InputError: a side or the inputs cannot be used.
    """
    session = PairSession(reference, candidate, checkpoint, inputs=inputs, seed=seed, bare=True)
    trace = session.whole.trace(session.inputs, FLOAT64)
    sites = [site for site in session.found.outline.shapes(session.inputs) if site != OUTPUT and site in trace]
    wanted = {site: trace[site] for site in sites}
    sizes = {site: size_of(value) for site, value in wanted.items()}

    def observe(fed: dict[str, NDArray]) -> Observed:
        recorder = Recorder(session.found.outline, session.inputs, fed=fed)
        session.candidate.tables = lambda inputs: recorder
        (output,) = session.candidate.outputs([session.inputs], FLOAT64, jit=False, tap=passing)
        shown = {key: value for key, value in recorder.values.items() if submodule_of(key) not in recorder.repeated}
        parts = {key: _parts(value) for key, value in shown.items()}
        matches = {site: found for site in sites if (found := _matches(wanted[site], sizes[site], parts))}
        right = output.shape == trace[OUTPUT].shape and error(output, trace[OUTPUT]).rms <= EQUAL
        return Observed(shown, matches, right)

    (shown, matches, _), different = look_past(observe, wanted)
    lines = [line._replace(equal=line.key not in different) for line in _lines(matches)]
    equal = {submodule_of(key) for found in matches.values() for key in found}
    return PairProposal(
        session.candidate.name,
        session.reference.name,
        tuple(_numbered(lines)),
        tuple(site for site in sites if site not in matches),
        tuple(key for key in shown if submodule_of(key) not in equal and ":" not in key),
    )


class _Part(NamedTuple):
    """A value of the candidate, or one of several equal parts of its last axis, with the expression that picks it."""

    picked: str
    value: NDArray
    size: float


def _parts(value: NDArray) -> list[_Part]:
    """Returns a value, and its equal parts."""
    found = []
    for parts in _PARTS:
        if not value.ndim or value.shape[-1] % parts:
            continue
        for which, part in enumerate(np.split(value, parts, axis=-1)):
            width = part.shape[-1]
            picked = f"x[..., {which * width} : {(which + 1) * width}]" if parts > 1 else "x"
            found.append(_Part(picked, part, size_of(part)))
    return found


def _matches(truth: NDArray, size: float, shown: Mapping[str, list[_Part]]) -> dict[str, str]:
    """Returns the candidate's values that equal a site, each with the expression that picks it.

    Outputs come before inputs, because gradients are compared at outputs.
    """
    outputs = {key: parts for key, parts in shown.items() if ":" not in key}
    found = {key: select for key, parts in outputs.items() if (select := _selection(parts, truth, size)) is not None}
    if found:
        return found
    entering = ((key, _selection(parts, truth, size)) for key, parts in shown.items() if key not in outputs)
    return next(({key: select} for key, select in entering if select is not None), {})


def _lines(matches: Mapping[str, dict[str, str]]) -> Iterator[Line]:
    """Yields one line for each site that has a match.

    A container returns what its last submodule returns. Then several sites, and several of the candidate's values, are
    equal. The outermost site goes to the outermost of these values, and so on inwards.
    """
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for site, found in matches.items():
        groups.setdefault(tuple(found.items()), []).append(site)
    chosen: dict[str, tuple[str, str]] = {}
    for ways, sites in groups.items():
        # In the order of the pass a container comes after its submodules.
        for k, site in enumerate(reversed(sites)):
            chosen[site] = ways[max(0, len(ways) - 1 - k)]
    for site in matches:
        key, select = chosen[site]
        yield Line(key, site, select)


def _selection(parts: list[_Part], truth: NDArray, size: float) -> str | None:
    """Returns the expression that makes one value of another; "" if they are equal, None if there is no expression."""
    for picked, part, its_size in parts:
        # No order of axes changes the size of a value, which takes a fraction of the time of all orders.
        if part.size != truth.size or not math.isclose(its_size, size, rel_tol=EQUAL):
            continue
        orders = itertools.permutations(range(part.ndim)) if part.ndim <= _MOST_AXES else ()
        for order in orders:
            moved = fitted(part.transpose(order), truth.shape)
            if moved.shape == truth.shape and error(moved, truth).rms <= EQUAL:
                plain = order == tuple(range(part.ndim))
                text = picked if plain else f"{picked}.transpose({', '.join(map(str, order))})"
                return "" if text == "x" else text
    return None


def _numbered(lines: list[Line]) -> Iterator[Line]:
    """Yields the lines. Lines that differ only in one number become one line with `{i}`."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((_template(line.key), _template(line.site), line.select), []).append(line)
    pairs = Counter((key, site) for key, site, _ in groups)
    for (key, site, select), members in groups.items():
        same = all(_number(line.key) == _number(line.site) != "" for line in members)
        # A line with `{i}` stands for every block, so no other line may give one of them its site.
        if same and len(members) > 1 and pairs[key, site] == 1:
            different = [line.key for line in members if not line.equal]
            where = () if len(different) == len(members) else tuple(different)
            yield Line(key, site, select, not different, where)
        else:
            yield from members


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.:\[])")


def _template(name: str) -> str:
    return _NUMBER.sub("{i}", name, count=1)


def _number(name: str) -> str:
    found = _NUMBER.search(name)
    return found[0] if found else ""


def _target(line: Line, shared: Mapping[str, str]) -> str:
    if not line.select:
        return json.dumps(line.site)
    return f"({json.dumps(line.site)}, {shared.get(line.select, f'lambda x: {line.select}')})"
