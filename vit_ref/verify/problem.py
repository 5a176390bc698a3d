"""The problem that is compared: inputs, the sites of a computation in order, and the gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence

from vit_ref.verify.compare.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Problem:
    """One computation on one batch of inputs, as the engine sees it.

    Attributes:
      inputs: one array of images, or any arrays by name. Floats are float32.
      shapes: the shape of the value at every compared site, in the order of the pass.
      streams: by site, the site whose value enters the part that computes it; None if only the inputs enter. If the
        reference's value is fed there, a divergence after it comes from this part alone. Without streams, the reference
        is fed at every site that the candidate shows, and a part is whatever lies between two of these.
      output: the shape of the output (B, ..., width), from which gradients are pulled back.
      gradients: names of all gradients, of sites, parameters and inputs, in the order of backpropagation. A parameter's
        name is its path, such as "layer.kernel".
      passed: all known sites in the order of the pass; empty if all of them are compared.
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
        """Returns the same problem with these sites only."""
        return dataclasses.replace(self, shapes={site: self.shapes[site] for site in sites})


def hidden_before(site: str, names: Sequence[str], shown: Container[str]) -> tuple[str, ...]:
    """Returns the sites right before `site` that a candidate does not show, in order.

    Args:
      site: the site's name.
      names: all sites in order.
      shown: the sites that the candidate shows.
    """
    gap: list[str] = []
    for name in reversed(names[: names.index(site)]):
        if name in shown:
            break
        gap.insert(0, name)
    return tuple(gap)
