"""Finds a candidate by `FILE.py` or `module:attribute`, and calls its loader."""

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

from vit_ref.errors import CandidateError, InputError
from vit_ref.verify.candidates.declaration import Candidate, declared, takes
from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.spec import split_spec
from vit_ref.verify.candidates.table import Table, described, elements, flat, gradients_by_path
from vit_ref.verify.compare.trace import Tap

# Includes SystemExit: a file that ends with sys.exit(0) would end this process with the exit code of a right candidate.
RAISED = (Exception, SystemExit)


def find(spec: str, default: str = "candidate") -> Candidate:
    """Returns the candidate, or the reference, that the caller names.

    Args:
      spec: `FILE.py:attribute` or `module:attribute`; the attribute may be left out.
      default: the attribute that is meant if the caller names none.

    Raises:
      CandidateError: the file, module or attribute does not exist, or importing it failed.
    """
    place, attribute = split_spec(spec)
    attribute = attribute or default
    directory = str(Path(place).parent.resolve()) if place.endswith(".py") else None
    with beside_it(directory):
        value = _file(Path(place)) if directory else _module(place)
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise CandidateError(f"{place}: it has no {attribute!r}: name the {default} as {place}:NAME")
        value = getattr(value, name)
    name = Path(place).stem if attribute == default else f"{Path(place).stem}-{attribute}"
    return dataclasses.replace(declared(value, name), directory=directory)


def _file(path: Path) -> Any:
    # It needs a name of its own: a candidate in a file jax.py must not replace jax.
    name = f"vit_ref_candidate_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # Python has a loader for each name that ends in .py
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up a class's module by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except RAISED as error:
        sys.modules.pop(name, None)
        raise CandidateError.raised(str(path), "importing it", error) from error
    return module


# Modules that were imported from beside a file, by the file's directory. No other code may meet them.
_imported: dict[str, dict[str, ModuleType]] = {}


@contextlib.contextmanager
def beside_it(directory: str | None) -> Iterator[None]:
    """Lets a candidate's file import its neighbours, as when Python runs the file, and hides them afterwards.

    Two candidates may each have a model.py. Without this, the second one would import the first one's.

    Args:
      directory: the directory of the candidate's file; None does nothing.
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
        # New modules of a package that was imported before stay visible to all code.
        tops = {name: name.partition(".")[0] for name in sys.modules.keys() - before.keys()}
        own = {top for top in set(tops.values()) - before.keys() if _is_neighbour(top, directory)} | known.keys()
        known |= {name: sys.modules[name] for name, top in tops.items() if top in own}
        for name in known.keys() & sys.modules.keys():
            if name in before:
                sys.modules[name] = before[name]
            else:
                del sys.modules[name]


def _is_neighbour(name: str, directory: str) -> bool:
    """Tells whether a module lies in this very directory, and not below it, for example in an environment."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    # A package is a directory itself.
    places = getattr(module, "__path__", [file] if file else [])
    return any(os.path.dirname(os.path.realpath(place)) == directory for place in places)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except RAISED as error:
        raise CandidateError.raised(name, "importing it", error) from error


def find_declaration(given: Candidate | Callable[..., Any] | str, default: str = "candidate") -> Candidate:
    """Returns the declaration that the caller gave or named.

    Args:
      given: a `Candidate`, a function from pixels to logits, or a name for `find`.
      default: see `find`.

    Raises:
      CandidateError: it is none of these, or `find` raised it.
    """
    if isinstance(given, str):
        return find(given, default)
    return declared(given, getattr(given, "__name__", default))


def load(candidate: Candidate, checkpoint: Path | None, dtype: DTypeLike) -> Any:
    """Calls the candidate's loader and returns the model.

    Args:
      candidate: the declaration.
      checkpoint: the checkpoint's directory or file; None for none.
      dtype: the dtype for a loader that takes one.

    Raises:
      CandidateError: the loader raised an exception.
    """
    try:
        with beside_it(candidate.directory):
            if takes(candidate.load, "dtype"):
                return candidate.load(checkpoint, dtype=np.dtype(dtype))
            return candidate.load(checkpoint)
    except RAISED as error:
        raise CandidateError.raised(candidate.name, "load()", error) from error


def is_torch(loaded: Any) -> bool:
    """Tells whether a model is a PyTorch module, without importing PyTorch: the loader of one has imported it.

    Args:
      loaded: what a loader returned.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(loaded, torch.nn.Module)


def observed(
    candidate: Candidate, outline: Outline, run: Callable[[Table, Tap | None], Any], table: Table, tap: Tap | None
) -> Any:
    """Runs one forward pass and passes every value that the candidate shows through a tap.

    The output's own site is the returned value, whatever the candidate shows under that name. So a candidate that
    shows logits but returns their softmax fails.

    Args:
      candidate: the declaration.
      outline: the names and shapes of the model that it is compared with.
      run: the forward pass.
      table: the candidate's table for these inputs; an empty one without a tap.
      tap: called with every site that the candidate shows; None to run the candidate as its users do.

    Returns:
      The output (B, width).

    Raises:
      CandidateError: the forward pass raised an exception, its values do not fit the table, or there is no output.
    """
    last = outline.output

    def before(site: str, value: Any) -> Any:
        return value if site == last or tap is None else tap(site, value)

    with beside_it(candidate.directory), in_one_line(candidate.name, "the forward pass"):
        returned = run(table, before if tap else None)
    output, named, table.parts = split_output(returned, candidate)
    outline.require_output(output, candidate.name)
    if tap is None:
        return output
    table.returned(named, before)
    table.fixed.discard(last)
    return tap(last, output)


@contextlib.contextmanager
def in_one_line(name: str, what: str) -> Iterator[None]:
    """Turns an exception from the candidate's own code into a message of one line.

    Args:
      name: the candidate's name.
      what: what the candidate was doing, for the message.

    Raises:
      CandidateError: the candidate's code raised an exception. Errors of this package pass unchanged.
    """
    try:
        yield
    # The caller handles jax's own errors, which mean that a function cannot be traced.
    except (InputError, jax.errors.JAXTypeError):
        raise
    except RAISED as error:
        raise CandidateError.raised(name, what, error) from error


def split_named(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """Splits what a model returned into its output and its intermediates by flat names, if there are any.

    Args:
      returned: what the model returned.
    """
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0], flat(returned[1])
    return returned, {}


def split_output(returned: Any, candidate: Candidate) -> tuple[Any, Mapping[str, Any], tuple[str, ...]]:
    """Returns a model's output, the intermediates that it returned with it, and the names of the output's parts.

    Args:
      returned: what the model returned.
      candidate: the declaration, whose `output` picks the output.

    Returns:
      The output; the intermediates by name; and the names in whose order several outputs were joined. There are no
      names if the output is one array, or a tuple, which is joined in its own order.

    Raises:
      CandidateError: the output is not an array, or `Candidate.output` cannot pick one.
    """
    name = candidate.name
    if candidate.output is None:
        returned, named = split_named(returned)
        output = getattr(returned, "logits", returned)
        if not getattr(output, "shape", ()) and not isinstance(output, Mapping | list):
            output = next(iter(elements(output).values()), output)
        if not getattr(output, "shape", ()):
            raise CandidateError(
                f"{name}: it returned a {described(output)}: return an array (B, ...), or pick one with output="
            )
        return output, named, ()
    _, named = split_named(returned)
    try:
        output = candidate.output(returned)
    except RAISED as error:
        raise CandidateError.raised(name, f"output() of a {described(returned)}", error) from error
    found = elements(output)
    # By name and not as they come, because two implementations seldom fill a mapping in the same order.
    names = () if len(found) < 2 or isinstance(output, (tuple, list)) else tuple(sorted(found))
    parts = [found[name] for name in names] or list(found.values()) or [output]
    for part in parts:
        if not getattr(part, "shape", ()):
            raise CandidateError(f"{name}: output() returned a {described(part)}: make it pick one array, or several")
    if len(parts) == 1:
        return parts[0] if len(parts[0].shape) > 1 else parts[0][:, None], named, names
    flattened = [part.reshape(part.shape[0], -1) for part in parts]
    return joined(flattened), named, names


def joined(parts: Sequence[Any]) -> Any:
    """Returns arrays of one framework, joined along their last axis.

    Args:
      parts: the arrays, all of PyTorch or all of JAX.
    """
    if is_torch_tensor(parts[0]):
        return sys.modules["torch"].cat(list(parts), dim=-1)
    return jax.numpy.concatenate(parts, axis=-1)


def is_torch_tensor(value: Any) -> bool:
    """Tells whether a value is a PyTorch tensor, without importing PyTorch.

    Args:
      value: the value.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def recognised(candidate: Candidate, outline: Outline, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Returns a candidate's gradients by the outline's names.

    Args:
      candidate: the declaration.
      outline: the names of the model that it is compared with.
      gradients: gradients by the candidate's own paths.

    Returns:
      Gradients that the candidate's table names, or that the outline recognises; else none.
    """
    if candidate.parameters is not None:
        return gradients_by_path(candidate.parameters, outline, gradients)
    return outline.recognise(gradients)
