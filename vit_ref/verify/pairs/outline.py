"""The outline of a declared reference: the sites and parameters that a run of it showed."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from vit_ref.verify.candidates.outline import Shape
from vit_ref.verify.candidates.table import counted

# The site of the output. No table names it.
OUTPUT = "output"


class DeclaredOutline:
    """The outline of a declared reference.

    Args:
      sites: shapes by site, in order, for the inputs of the comparison. The output is not among them.
      output: the shape of the output.
      parameters: shapes by the reference's parameters.
    """

    output = OUTPUT
    example: Any = None
    takes_first = True

    def __init__(self, sites: Mapping[str, Shape], output: Shape, parameters: Mapping[str, Shape]):
        # A submodule may have the output's name, but is no site then.
        self._sites = {**{site: shape for site, shape in sites.items() if site != OUTPUT}, OUTPUT: output}
        self._parameters = parameters

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """Implements `Outline.shapes`. Sites are shown for whole inputs only, so their shapes are known."""
        return self._sites

    def only(self, sites: Container[str]) -> DeclaredOutline:
        """Returns the outline with these sites and the output only."""
        kept = {site: shape for site, shape in self._sites.items() if site in sites}
        return DeclaredOutline(kept, self._sites[OUTPUT], self._parameters)

    def parameters(self) -> Mapping[str, Shape]:
        """Implements `Outline.parameters`."""
        return self._parameters

    def numbers(self, pattern: str, known: Container[str]) -> Iterable[int]:
        """Implements `Outline.numbers`: returns the numbers for which the reference has the name."""
        first, *rest = map(re.escape, pattern.split("{i}"))
        shape = re.compile(f"{first}(?P<i>\\d+)" + "".join(f"{part}(?P=i)" for part in rest[:-1]) + rest[-1])
        found = (shape.fullmatch(name) for name in known) if rest and isinstance(known, Iterable) else ()
        return sorted({int(match["i"]) for match in found if match})

    def optional(self, what: str) -> Container[str]:
        """Implements `Outline.optional`: returns nothing."""
        return ()

    def goes_past(self, site: str) -> bool:
        """Implements `Outline.goes_past`. A value that enters a submodule may be used elsewhere too."""
        return True

    def recognise(self, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Implements `Outline.recognise`. It recognises the reference's own names."""
        named = {counted(name): value for name, value in gradients.items()}
        return {name: value for name, value in named.items() if name in self._parameters}

    def require_output(self, output: Any, name: str) -> None:
        """Implements `Outline.require_output`. It accepts any output, because another shape counts as a divergence."""
