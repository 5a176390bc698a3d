"""From `FILE.py` or `module:attribute` to a candidate, and from its loader to a port, of whatever kind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError, first_line
from vit_ref.verify.candidates.declaration import Candidate, declared, takes
from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.table import Table, described, elements, flat, gradients_by_path
from vit_ref.verify.compare.trace import Tap

# A script that ends with sys.exit(0) would otherwise end the judge, with the exit code of a port that is right.
RAISED = (Exception, SystemExit)


def find(spec: str, default: str = "candidate") -> Candidate:
    """The candidate, or the reference, that a person names.

    Args:
      spec: `FILE.py` or `module`, or `FILE.py:attribute` or `module:attribute`.
      default: the attribute that is meant where none is named.

    Raises:
      CandidateError: there is no such file, module or attribute, or importing it failed.
    """
    place, _, attribute = spec.partition(":")
    attribute = attribute or default
    directory = str(Path(place).parent.resolve()) if place.endswith(".py") else None
    with beside_it(directory):
        found = _file(Path(place)) if directory else _module(place)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise CandidateError(f"{place}: it has no {attribute!r}: name one as {place}:NAME")
        found = getattr(found, name)
    name = Path(place).stem if attribute == default else f"{Path(place).stem}-{attribute}"
    return dataclasses.replace(declared(found, name), directory=directory)


def _file(path: Path) -> Any:
    if not path.is_file():
        raise CandidateError(f"{path}: no such file")
    # A name of its own: a port in a file jax.py is not to stand for jax.
    name = f"vit_ref_candidate_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CandidateError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look a class's module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except RAISED as error:
        sys.modules.pop(name, None)
        raise CandidateError.raised(str(path), "importing it", error) from error
    return module


# What was imported from beside a file, by the file's directory: nobody else is to meet it.
_imported: dict[str, dict[str, ModuleType]] = {}


@contextlib.contextmanager
def beside_it(directory: str | None) -> Iterator[None]:
    """Lets the neighbours of a candidate's file be imported, as when Python runs the file, and hides them afterwards.

    Two ports may have a model.py each, and the second would be judged with the first's.
    """
    if directory is None:
        yield
        return
    known = _imported.setdefault(directory, {})
    before = dict(sys.modules)
    sys.modules.update(known)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        if directory in sys.path:
            sys.path.remove(directory)
        # Of a package that was there before, what is new is everybody's.
        tops = {name: name.partition(".")[0] for name in sys.modules.keys() - before.keys()}
        own = {top for top in set(tops.values()) - before.keys() if _is_neighbour(top, directory)} | known.keys()
        known |= {name: sys.modules[name] for name, top in tops.items() if top in own}
        for name in known.keys() & sys.modules.keys():
            if name in before:
                sys.modules[name] = before[name]
            else:
                del sys.modules[name]


def _is_neighbour(name: str, directory: str) -> bool:
    """Whether a module was found in this very directory, and not in an environment below it, say."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    # A package is a directory itself.
    places = getattr(module, "__path__", [file] if file else [])
    return any(os.path.dirname(os.path.realpath(place)) == directory for place in places)


def _module(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise CandidateError(f"{name}: neither a Python file nor the name of a module")
    try:
        return importlib.import_module(name)
    except RAISED as error:
        raise CandidateError.raised(name, "importing it", error) from error


def find_declaration(given: Candidate | Callable[..., Any] | str, default: str = "candidate") -> Candidate:
    """The declaration that a person gave, or said where to find; see `find` for `default`."""
    if isinstance(given, str):
        return find(given, default)
    return declared(given, getattr(given, "__name__", default))


def load(candidate: Candidate, checkpoint: Path | None, dtype: DTypeLike) -> Any:
    """What the candidate's loader returns.

    Raises:
      CandidateError: it raised something.
    """
    try:
        with beside_it(candidate.directory):
            if takes(candidate.load, "dtype"):
                return candidate.load(checkpoint, dtype=np.dtype(dtype))
            return candidate.load(checkpoint)
    except RAISED as error:
        raise CandidateError.raised(candidate.name, "load()", error) from error


def is_torch(port: Any) -> bool:
    """Whether a port is a PyTorch module, found out without importing PyTorch: who made one has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(port, torch.nn.Module)


def observed(
    candidate: Candidate, outline: Outline, run: Callable[[Table, Tap | None], Any], table: Table, tap: Tap | None
) -> Any:
    """The output of one forward pass, every value that the port shows passed through a tap.

    The output's own site is what is returned, whatever the port shows under its name: a port that shows logits and
    returns their softmax has to fail.

    Args:
      candidate: the declaration.
      outline: what it is compared with.
      run: the forward pass.
      table: the candidate's, for these inputs; an empty one without a tap.
      tap: called with every site that the candidate shows; None to run it as its users do.

    Raises:
      CandidateError: the forward pass raised something, its values do not fit the table, or there is no output.
    """
    last = outline.output

    def before(site: str, value: Any) -> Any:
        return value if site == last or tap is None else tap(site, value)

    with beside_it(candidate.directory), in_one_line(candidate.name, "the forward pass"):
        returned = run(table, before if tap else None)
    output, named = split_output(returned, candidate)
    outline.require_output(output, candidate.name)
    if tap is None:
        return output
    table.returned(named, before)
    table.fixed.discard(last)
    return tap(last, output)


@contextlib.contextmanager
def in_one_line(name: str, what: str) -> Iterator[None]:
    """Turns what a person's object raises into one line.

    Args:
      name: the candidate's.
      what: what was done with the object, for the message.

    Raises:
      CandidateError: it raised something. Errors of this package say more already, and pass.
    """
    try:
        yield
    # The caller acts on jax's own word that a function cannot be traced.
    except (InputError, jax.errors.JAXTypeError):
        raise
    except RAISED as error:
        raise CandidateError.raised(name, what, error) from error


def split_named(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """What a port returned, and the intermediates with it by flat names, of which there may be none."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0], flat(returned[1])
    return returned, {}


def split_output(returned: Any, candidate: Candidate) -> tuple[Any, Mapping[str, Any]]:
    """A candidate's output, and the intermediates that it returned with it.

    Raises:
      CandidateError: there is no array in it, or `Candidate.output` cannot pick one.
    """
    name = candidate.name
    if candidate.output is None:
        returned, named = split_named(returned)
        output = getattr(returned, "logits", returned)
        if not getattr(output, "shape", ()) and not isinstance(output, Mapping | list):
            output = next(iter(elements(output).values()), output)
        if not getattr(output, "shape", ()):
            raise CandidateError(f"{name}: it returned a {described(output)}: logits (B, classes) are expected")
        return output, named
    _, named = split_named(returned)
    try:
        output = candidate.output(returned)
    except RAISED as error:
        raise CandidateError(
            f"{name}: output() of a {described(returned)} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    parts = list(elements(output).values()) or [output]
    for part in parts:
        if not getattr(part, "shape", ()):
            raise CandidateError(f"{name}: output() returned a {described(part)}: pick an array, or several")
    if len(parts) == 1:
        return parts[0] if len(parts[0].shape) > 1 else parts[0][:, None], named
    flattened = [part.reshape(part.shape[0], -1) for part in parts]
    return joined(flattened), named


def joined(parts: Sequence[Any]) -> Any:
    """Arrays of one framework, side by side along their last axis."""
    if is_torch_tensor(parts[0]):
        return sys.modules["torch"].cat(list(parts), dim=-1)
    return jax.numpy.concatenate(parts, axis=-1)


def is_torch_tensor(value: Any) -> bool:
    """Whether a value is PyTorch's, found out without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def recognised(candidate: Candidate, outline: Outline, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """A candidate's gradients by the outline's names: by its table, or as the outline recognises them."""
    if candidate.parameters is not None:
        return gradients_by_path(candidate.parameters, outline, gradients)
    return outline.recognise(gradients)
