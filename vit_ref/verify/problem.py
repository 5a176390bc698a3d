"""What is compared: inputs, the sites of a computation in order, and the gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence

from vit_ref.verify.compare.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Problem:
    """One computation on one batch of inputs, as the engine sees it.

    Attributes:
      inputs: what enters: one array of images, or any arrays by name; floats are float32.
      shapes: every site that is compared, with the shape of its value, in the order of the pass.
      streams: by site, the site whose value enters its part; None where nothing but the inputs does. Feeding a
        reference's value there isolates the part: what diverges after it diverges in it. Without streams, every value
        that the candidate shows is fed, and a part is what lies between two of them.
      output: the shape of the output (B, ..., width), from which gradients are pulled back.
      gradients: names of all gradients, of sites, parameters and inputs, in the order in which backpropagation meets
        them. A parameter's name is its path: "layer.kernel".
      passed: all sites in the order of the pass, where more are known than are compared.
    """

    inputs: Inputs
    shapes: Mapping[str, tuple[int, ...]]
    streams: Mapping[str, str | None] | None
    output: tuple[int, ...]
    gradients: tuple[str, ...]
    passed: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the sites that are compared, in order."""
        return list(self.shapes)

    @property
    def order(self) -> list[str]:
        """The names of all sites, compared or not, in order."""
        return list(self.passed or self.shapes)

    def only(self, sites: Iterable[str]) -> Problem:
        """The same with these sites alone."""
        return dataclasses.replace(self, shapes={site: self.shapes[site] for site in sites})


def hidden_before(site: str, names: Sequence[str], shown: Container[str]) -> tuple[str, ...]:
    """The sites right before `site` that a candidate does not show, in order."""
    gap: list[str] = []
    for name in reversed(names[: names.index(site)]):
        if name in shown:
            break
        gap.insert(0, name)
    return tuple(gap)
