"""Finds the sites of a reference: the outputs of its named submodules, in the order of the pass."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Set
from typing import Any

from numpy.typing import NDArray

from vit_ref.errors import CandidateError
from vit_ref.verify.candidates.declaration import Mapped
from vit_ref.verify.candidates.outline import Shape
from vit_ref.verify.candidates.table import claimed
from vit_ref.verify.compare.inputs import Inputs, copy_inputs
from vit_ref.verify.pairs.outline import OUTPUT, DeclaredOutline
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.proposals.recording import Recorder

# A declared implementation, in JAX or in PyTorch. The class for PyTorch is not imported here.
Declared = Any


@dataclasses.dataclass(frozen=True)
class Discovery:
    """Sites and parameters that were found in a reference.

    Attributes:
      outline: its sites and parameters.
      table: its own paths -> its sites.
      repeated: submodules that run more than once in a pass. They are no sites.
      output: the reference's output in float64.
    """

    outline: DeclaredOutline
    table: dict[str, Any]
    repeated: tuple[str, ...]
    output: NDArray


class AnyShape(dict[str, Shape]):
    """Shapes of sites that are not known yet. A table with these shapes fits no value to another shape."""

    def __missing__(self, site: str) -> Shape:
        return ()

    def __contains__(self, site: object) -> bool:
        return True


class Blank(DeclaredOutline):
    """The outline of a reference that has not run yet."""

    def __init__(self) -> None:
        super().__init__({}, (), {})

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """Implements `Outline.shapes`."""
        return AnyShape()


def discover(reference: Declared, given: Mapped | None, inputs: Inputs) -> Discovery:
    """Runs a reference once in float64, and lists its sites.

    Args:
      reference: the reference. This function sets its `tables`.
      given: the table of `Reference.sites`; None for the outputs of all submodules.
      inputs: the inputs of the comparison.

    Raises:
      CandidateError: the reference cannot be run, or its table has an unknown name.
    """
    recorder = Recorder(Blank(), None, keep=lambda value: tuple(value.shape))
    shapes: dict[str, Shape] = {}

    def keep(site: str, value: Any) -> Any:
        shapes[site] = tuple(value.shape)
        return value

    reference.tables = lambda inputs: recorder
    (output,) = reference.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=keep)
    if given is None:
        table = {key: _site_of(key) for key in recorder.values if _is_output(key, recorder.repeated)}
        found = {site: recorder.values[key] for key, site in table.items()}
    else:
        table = counted_out(given, recorder.met)
        reference.tables = lambda inputs: reference._table(table, inputs)
        reference.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=keep)
        found = {site: shape for site, shape in shapes.items() if site != OUTPUT}
        for site in sorted(claimed(table, Blank(), AnyShape()) - shapes.keys()):
            raise CandidateError(
                f"sites: {site!r} has no value: its submodule is not called, or is in a jit or a scan: remove its line"
            )
    parameters = {name: value.shape for name, value in reference.parameters().items()}
    outline = DeclaredOutline(found, shapes[OUTPUT], parameters)
    return Discovery(outline, table, () if given else tuple(sorted(recorder.repeated)), output)


def _is_output(key: str, repeated: Set[str]) -> bool:
    return ":input" not in key and submodule_of(key) not in repeated


def _site_of(key: str) -> str:
    """Returns the name of a site: the path; for element k of a tuple but the first, or for a field, `path:k`."""
    path, _, element = key.rstrip("]").partition("[")
    return path if element in ("", "0") else f"{path}:{element}"


def submodule_of(key: str) -> str:
    """Returns the path of a submodule, without what a key of a table picks from its values."""
    return re.split(r"[:\[]", key)[0]


def counted_out(given: Mapped, paths: Set[str]) -> dict[str, Any]:
    """Returns a reference's own table with a line for each number that `{i}` stands for.

    Raises:
      CandidateError: `{i}` stands for no number.
    """
    if not isinstance(given, Mapping):
        return given  # `bind` refuses it
    outline = Blank()
    table: dict[str, Any] = {}
    for key, targets in given.items():
        if not isinstance(key, str) or "{i}" not in key:
            table[key] = targets
            continue
        path = submodule_of(key)
        numbers = tuple(outline.numbers(path, paths))
        if not numbers:
            raise CandidateError(f"sites: the reference has no submodule {path!r}")
        for i in numbers:
            table[key.replace("{i}", str(i))] = _numbered(targets, i)
    return table


def _numbered(targets: Any, i: int) -> Any:
    if isinstance(targets, str):
        return targets.replace("{i}", str(i))
    if isinstance(targets, tuple) and targets:
        return (_numbered(targets[0], i), *targets[1:])
    return [_numbered(target, i) for target in targets] if isinstance(targets, list) else targets
