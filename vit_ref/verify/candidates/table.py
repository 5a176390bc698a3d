"""The table of a candidate for one outline: which of its values belongs to which site, and how to select it.

The table picks a site's value out of a value of the candidate. It also writes a changed value back, so that a site can
be replaced or perturbed from outside. A selection only moves elements. So its transpose, which any framework's
differentiation gives, puts them back.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from vit_ref.errors import CandidateError
from vit_ref.verify.candidates.declaration import Mapped, hint
from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.compare.trace import Tap

# (function, value) -> (function(value), pull-back): jax.vjp, or torch.func.vjp in the same form.
Vjp = Callable[[Callable[[Any], Any], Any], tuple[Any, Callable[[Any], Any]]]

_POINT = re.compile(r"(?P<path>[^:\[\]]*)(?P<input>:input)?(?:\[(?P<key>[^\[\]]+)\])?")


class Point(NamedTuple):
    """A place in the candidate: the output of the submodule at `path`, or its input, or one element of either."""

    path: str
    of_input: bool = False
    key: int | str | None = None


class Entry(NamedTuple):
    """One line of the bound table.

    Attributes:
      destination: the site or parameter.
      select: picks it out of the value at a point; None for the whole value.
    """

    destination: str
    select: Callable[[Any], Any] | None = None


class Table:
    """A candidate's table for one outline and batch.

    Args:
      mapped: see `Candidate.sites`; None if the candidate uses the sites' own names.
      outline: the outline that has the sites.
      inputs: the inputs. Only their shapes matter.
      vjp: the framework's function for pull-backs.
      single: sites at inputs of submodules that nothing else uses.

    Raises:
      CandidateError: a key cannot be read, a value is no site, or two keys claim one site.
    """

    def __init__(self, mapped: Mapped | None, outline: Outline, inputs: Any, vjp: Vjp, single: Set[str] = frozenset()):
        self.shapes = outline.shapes(inputs)
        self._outline = outline
        self.given = mapped is not None
        entries = bind(mapped, "sites", outline, self.shapes) if mapped is not None else {}
        self.points = {_point(key): found for key, found in entries.items()}
        self.paths = frozenset(point.path for point in self.points)
        # Sites that are shown after their use, or not at every use. A change there would have no effect, or too little.
        self.fixed: set[str] = set()
        # Names that the candidate gave to its tap, or returned.
        self.met: set[str] = set()
        # Names of the outputs that were joined to one, in order.
        self.parts: tuple[str, ...] = ()
        self._vjp = vjp
        self._single = single

    def path_of(self, site: str) -> str:
        """Returns the path of the submodule, or the name of the value, that stands for a site."""
        found = (point.path for point, entries in self.points.items() for entry in entries if entry.destination == site)
        return next(found, site)

    def at_input(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap) -> tuple[Any, Any]:
        """Passes a submodule's arguments through the tap at their sites.

        Args:
          path: the submodule's path.
          args: its positional arguments.
          kwargs: its keyword arguments.
          tap: called with every site and its value.

        Returns:
          The arguments to use in their place.
        """
        for point in self.points:
            if point.path != path or not point.of_input:
                continue
            key = 0 if point.key is None else point.key
            if isinstance(key, int) and key < len(args):
                args = (*args[:key], self._through(point, args[key], tap), *args[key + 1 :])
            elif key in kwargs or (point.key is None and kwargs):
                key = next(iter(kwargs)) if point.key is None else key
                kwargs = {**kwargs, str(key): self._through(point, kwargs[str(key)], tap)}
        return args, kwargs

    def at_output(self, path: str, output: Any, tap: Tap) -> Any:
        """Passes a submodule's output through the tap at its sites.

        Args:
          path: the submodule's path.
          output: its output.
          tap: called with every site and its value.

        Returns:
          The output to use in its place.
        """
        for point in self.points:
            if point.path != path or point.of_input:
                continue
            if point.key is None and self._outline.takes_first and isinstance(output, (tuple, list)) and output:
                output = with_element(output, 0, self._through(point, output[0], tap))
            elif point.key is None:
                output = self._through(point, output, tap)
            elif (element := elements(output).get(str(point.key))) is not None:
                output = with_element(output, point.key, self._through(point, element, tap))
        return output

    def at_name(self, name: str, value: Any, tap: Tap) -> Any:
        """Passes a named value through the tap at its sites, and returns the value to use in its place.

        Args:
          name: the value's name.
          value: the value.
          tap: called with every site and its value.
        """
        name = counted(name)
        self.met.add(name)
        if self.given:
            return self._through(Point(name), value, tap)
        return self._pass(Entry(name), value, tap) if name in self.shapes else value

    def returned(self, named: Mapping[str, Any], tap: Tap) -> None:
        """Shows the tap intermediates that came back with the output. They can no longer be changed.

        Args:
          named: the intermediates by name.
          tap: called with every site and its value.
        """
        for name, value in named.items():
            self.at_name(name, value, self._fixing(tap))

    def _fixing(self, tap: Tap) -> Tap:
        def show(site: str, value: Any) -> Any:
            self.fixed.add(site)
            tap(site, value)
            return value

        return show

    def _through(self, point: Point, value: Any, tap: Tap) -> Any:
        for entry in self.points.get(point, ()):
            site = entry.destination
            # The input of a module that holds others enters all of them.
            whole = not point.of_input or any(path.startswith(f"{point.path}.") for path in self.paths)
            whole = whole or site in self._single or not self._outline.goes_past(site)
            value = self._pass(entry, value, tap if whole else self._fixing(tap))
        return value

    def _pass(self, entry: Entry, value: Any, tap: Tap) -> Any:
        shape = self.shapes[entry.destination]
        select = entry.select
        if select is None:
            if not hasattr(value, "shape"):
                raise CandidateError(
                    f"sites: {entry.destination}: there is a {described(value)}: name one of its elements,"
                    " as in 'path[0]'"
                )
            picked = fitted(value, shape)
            changed = tap(entry.destination, picked)
            return value if changed is picked else changed.reshape(value.shape)
        try:
            picked, pull_back = self._vjp(lambda x: fitted(select(x), shape), value)
        except Exception as error:
            raise CandidateError(
                f"sites: {entry.destination}: its selection cannot be applied to a {described(value)}: {error}"
            ) from error
        changed = tap(entry.destination, picked)
        return value if changed is picked else value + pull_back(changed - picked)


class EveryPath(frozenset[str]):
    """The paths of a table that asks for every value: it contains any path, but lists none that could be missing."""

    def __contains__(self, path: object) -> bool:
        return True

    def __and__(self, paths: Set[Any]) -> frozenset[str]:
        return frozenset(paths)


def counted(name: str) -> str:
    """Returns a name with its numbers written as `{i}` writes them in a table: "block7" for "block07"."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", name)


def flat(named: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flattens nested mappings: the name of `out["encoder"]["block00"]` is "encoder.block0".

    Args:
      named: values or mappings by name.
      before: prefix of all names.
    """
    found: dict[str, Any] = {}
    for name, value in named.items():
        path = f"{before}{counted(str(name))}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def elements(output: Any) -> dict[str, Any]:
    """Returns the elements of a submodule's output, by number or by name. A single value has none."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return {str(k): value for k, value in enumerate(output)}
    if dataclasses.is_dataclass(output) and not isinstance(output, type) and not hasattr(output, "shape"):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def with_element(output: Any, key: int | str, value: Any) -> Any:
    """Returns the same output with another value in place of one element.

    Args:
      output: a submodule's output, which has elements.
      key: the element's number or name.
      value: the new value.
    """
    if type(output) is dict:
        return {**output, key: value}
    if isinstance(output, Mapping):
        # For example transformers' outputs, whose elements are attributes too.
        changed: Any = copy.copy(output)
        changed[key] = value
        return changed
    if isinstance(output, (tuple, list)):
        several = [value if str(k) == str(key) else each for k, each in enumerate(output)]
        return type(output)(*several) if hasattr(output, "_fields") else type(output)(several)
    return dataclasses.replace(output, **{str(key): value})


def bind(mapped: Mapped, what: str, outline: Outline, known: Mapping[str, Any]) -> dict[str, tuple[Entry, ...]]:
    """Returns a table with a line for each number that `{i}` stands for.

    Args:
      mapped: see `Candidate`.
      what: "sites" or "parameters", for messages.
      outline: the outline that has the destinations.
      known: all destinations.

    Returns:
      Entries by key.

    Raises:
      CandidateError: `mapped` is no table, or a destination in it is unknown or claimed twice.
    """
    if not isinstance(mapped, Mapping):
        raise CandidateError(f"{what}: a {type(mapped).__name__}: give a dict from its names to the reference's")
    optional = outline.optional(what)
    bound: dict[str, tuple[Entry, ...]] = {}
    claimed: dict[str, str] = {}
    for key, targets in mapped.items():
        several = targets if isinstance(targets, list) else [targets]
        for target in several:
            pattern, select = target if isinstance(target, tuple) and len(target) == 2 else (target, None)
            if not isinstance(key, str) or not isinstance(pattern, str) or not (select is None or callable(select)):
                raise CandidateError(
                    f"{what}: {key!r}: {target!r} cannot be read: give a name, (name, selection), or a list of these"
                )
            if "{i}" in key and "{i}" not in pattern:
                raise CandidateError(
                    f"{what}: {key!r}: {pattern!r} has no {{i}}, so every number would mean the same: write {{i}} there"
                    " too, or one number in the key"
                )
            numbers = tuple(outline.numbers(pattern, known)) if "{i}" in pattern else (None,)
            if not numbers and pattern not in optional:
                raise CandidateError(f"{what}: {key!r}: {pattern!r} is none of this model's{hint(pattern, known)}")
            for i in numbers:
                source, destination = (counted(text.replace("{i}", str(i))) for text in (key, pattern))
                stacked = i is not None and "{i}" not in key
                entry = Entry(destination, _of_block(i, select) if stacked else select)
                if destination not in known:
                    if destination in optional:
                        continue
                    raise CandidateError(
                        f"{what}: {key!r}: {destination!r} is none of this model's{hint(destination, known)}"
                    )
                if destination in claimed:
                    raise CandidateError(f"{what}: {claimed[destination]!r} and {source!r} both claim {destination}")
                claimed[destination] = source
                bound[source] = (*bound.get(source, ()), entry)
    return bound


def claimed(mapped: Mapped | None, outline: Outline, known: Mapping[str, Any]) -> frozenset[str]:
    """Returns the known sites that a table promises to show.

    Args:
      mapped: see `Candidate.sites`.
      outline: the outline that has the sites.
      known: all sites.
    """
    if mapped is None:
        return frozenset()
    return frozenset(
        entry.destination for entries in bind(mapped, "sites", outline, known).values() for entry in entries
    )


def gradients_by_path(mapped: Mapped, outline: Outline, gradients: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the gradients that a table names, under the outline's names and in its shapes.

    Args:
      mapped: see `Candidate.parameters`.
      outline: the outline that has the parameters.
      gradients: gradients by the candidate's own paths.

    Raises:
      CandidateError: the table names a parameter that the candidate or the outline does not have.
    """
    shapes, gradients = outline.parameters(), {counted(name): value for name, value in gradients.items()}
    found = {}
    for source, entries in bind(mapped, "parameters", outline, shapes).items():
        if source not in gradients:
            raise CandidateError(f"parameters: there is no parameter {source!r}{hint(source, gradients)}")
        for entry in entries:
            try:
                value = entry.select(gradients[source]) if entry.select else gradients[source]
            except Exception as error:
                raise CandidateError(
                    f"parameters: {entry.destination}: its selection cannot be applied to a"
                    f" {described(gradients[source])}: {error}"
                ) from error
            found[entry.destination] = fitted(value, shapes[entry.destination])
    return found


def fitted(value: Any, shape: tuple[int, ...]) -> Any:
    """Returns the value in another shape if merging or splitting neighbouring axes gives it; else the value unchanged.

    Any other reshape would scramble the elements, for example one of (B, H, N, K) to (B, N, H, K).

    Args:
      value: the value.
      shape: the wanted shape.
    """
    have = tuple(getattr(value, "shape", ()))
    if have == shape:
        return value
    front = 0
    while front < min(len(have), len(shape)) and have[front] == shape[front]:
        front += 1
    back = 0
    while back < min(len(have), len(shape)) - front and have[-1 - back] == shape[-1 - back]:
        back += 1
    ours, theirs = have[front : len(have) - back], shape[front : len(shape) - back]
    return value.reshape(shape) if math.prod(ours) == math.prod(theirs) and min(len(ours), len(theirs)) <= 1 else value


def _of_block(i: int | None, select: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    return (lambda x: select(x[i])) if select else (lambda x: x[i])


def described(value: Any) -> str:
    """Returns a description of a value for messages: its shape or its type."""
    shape = getattr(value, "shape", None)
    return f"value of shape {tuple(shape)}" if shape is not None else type(value).__name__


def _point(key: str) -> Point:
    match = _POINT.fullmatch(key)
    if match is None:
        raise CandidateError(f"sites: {key!r} cannot be read: give 'path', 'path:input', 'path[0]' or 'path:input[1]'")
    index = match["key"]
    return Point(match["path"], bool(match["input"]), int(index) if index and index.isdecimal() else index)
