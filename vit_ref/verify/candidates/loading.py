"""From `FILE.py` or `module:attribute` to a candidate, and from its loader to a port, of whatever kind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import output_site
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.candidates.declaration import Candidate, declared, takes
from vit_ref.verify.candidates.table import Table, claimed, described, flat, gradients_by_path
from vit_ref.verify.compare.trace import Tap
from vit_ref.weights import mapping

# A script that ends with sys.exit(0) would otherwise end the judge, with the exit code of a port that is right.
RAISED = (Exception, SystemExit)


def find(spec: str) -> Candidate:
    """The candidate that `--candidate` names.

    Args:
      spec: `FILE.py` or `module`, whose attribute `candidate` is meant, or `FILE.py:attribute` or `module:attribute`.

    Raises:
      CandidateError: there is no such file, module or attribute, or importing it failed.
    """
    place, _, attribute = spec.partition(":")
    attribute = attribute or "candidate"
    directory = str(Path(place).parent.resolve()) if place.endswith(".py") else None
    with beside_it(directory):
        found = _file(Path(place)) if directory else _module(place)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise CandidateError(f"{place}: it has no {attribute!r}: name one as {place}:NAME")
        found = getattr(found, name)
    name = Path(place).stem if attribute == "candidate" else f"{Path(place).stem}-{attribute}"
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


def load(candidate: Candidate, checkpoint: Path, dtype: DTypeLike) -> Any:
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
    candidate: Candidate, config: ViTConfig, run: Callable[[Table, Tap | None], Any], table: Table, tap: Tap | None
) -> Any:
    """The output of one forward pass, every value that the port shows passed through a tap.

    The output's own site is what is returned, whatever the port shows under its name: a port that shows logits and
    returns their softmax has to fail.

    Args:
      candidate: the declaration.
      config: the checkpoint's configuration.
      run: the forward pass.
      table: the candidate's, for these images; an empty one without a tap.
      tap: called with every site that the candidate shows; None to run it as its users do.

    Raises:
      CandidateError: the forward pass raised something, its values do not fit the table, or there is no output.
    """
    last = output_site(config)

    def before(site: str, value: Any) -> Any:
        return value if site == last or tap is None else tap(site, value)

    with beside_it(candidate.directory), in_one_line(candidate.name, "the forward pass"):
        returned = run(table, before if tap else None)
    output, named = split_output(returned, candidate.name)
    if last == "cls" and len(output.shape) == 3:
        raise CandidateError(
            f"{candidate.name}: it returned a value of shape {tuple(output.shape)}: without a head the cls token (B, D)"
            " is expected: give call=lambda port, images: port(images)[:, 0]"
        )
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


def claims(candidate: Candidate, config: ViTConfig) -> frozenset[str]:
    """The sites that a candidate promises to show: those of its table, and its output.

    Raises:
      CandidateError: the table does not fit the configuration.
    """
    return claimed(candidate.sites, config) | {output_site(config)}


def split_named(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """What a port returned, and the intermediates with it by flat names, of which there may be none."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0], flat(returned[1])
    return returned, {}


def split_output(returned: Any, name: str) -> tuple[Any, Mapping[str, Any]]:
    """A port's output, and the intermediates that it returned with it.

    Raises:
      CandidateError: there is no array in it.
    """
    returned, named = split_named(returned)
    output = getattr(returned, "logits", returned)
    output = output[0] if isinstance(output, tuple) else output
    if not getattr(output, "shape", ()):
        raise CandidateError(f"{name}: it returned a {described(output)}: logits (B, classes) are expected")
    return output, named


def recognised(candidate: Candidate, config: ViTConfig, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """A port's gradients by this package's paths: by its table, or by those or a layout's names; else none."""
    if candidate.parameters is not None:
        return gradients_by_path(candidate.parameters, config, gradients)
    if gradients.keys() == list_parameters(config).keys():
        return dict(gradients)
    for separator in "./":
        named = {name.replace(".", separator): value for name, value in gradients.items()}
        try:
            return mapping.port(named, config, mapping.detect(named), finite=False)
        except MappingError:
            continue
    return {}
