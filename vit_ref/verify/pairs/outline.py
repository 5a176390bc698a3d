"""The outline of a declared reference: the sites and parameters that it was seen to have."""

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
    """See `Outline`.

    Args:
      sites: every site but the output, with the shape of its value on the inputs that are compared, in order.
      output: the shape of the output.
      parameters: the reference's, with their shapes.
    """

    output = OUTPUT
    example: Any = None
    takes_first = True

    def __init__(self, sites: Mapping[str, Shape], output: Shape, parameters: Mapping[str, Shape]):
        # A submodule may have the output's name, but is no site then.
        self._sites = {**{site: shape for site, shape in sites.items() if site != OUTPUT}, OUTPUT: output}
        self._parameters = parameters

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """See `Outline.shapes`. Sites are shown on whole inputs alone, whose shapes are known."""
        return self._sites

    def only(self, sites: Container[str]) -> DeclaredOutline:
        """Returns the outline with these sites alone, and the output."""
        kept = {site: shape for site, shape in self._sites.items() if site in sites}
        return DeclaredOutline(kept, self._sites[OUTPUT], self._parameters)

    def parameters(self) -> Mapping[str, Shape]:
        """See `Outline.parameters`."""
        return self._parameters

    def numbers(self, pattern: str, known: Container[str]) -> Iterable[int]:
        """See `Outline.numbers`: those for which the reference has the name."""
        first, *rest = map(re.escape, pattern.split("{i}"))
        shape = re.compile(f"{first}(?P<i>\\d+)" + "".join(f"{part}(?P=i)" for part in rest[:-1]) + rest[-1])
        found = (shape.fullmatch(name) for name in known) if rest and isinstance(known, Iterable) else ()
        return sorted({int(match["i"]) for match in found if match})

    def optional(self, what: str) -> Container[str]:
        """See `Outline.optional`: none."""
        return ()

    def goes_past(self, site: str) -> bool:
        """See `Outline.goes_past`: nobody knows, so that what enters a submodule may be used elsewhere."""
        return True

    def recognise(self, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """See `Outline.recognise`: those with the reference's own names."""
        named = {counted(name): value for name, value in gradients.items()}
        return {name: value for name, value in named.items() if name in self._parameters}

    def require_output(self, output: Any, name: str) -> None:
        """See `Outline.require_output`: another shape than the reference's is a divergence, and no bad input."""
