"""Errors of gradients, pooled over objectives: what they come to, and when enough objectives have been asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.gates import Error, Errors, numerical_gate, root_mean_square
from vit_ref.verify.results import Explanation, SiteResult

# Where every gradient's error so far is within this part of its gate, the objectives that remain are left out. Right
# ports on a trained ViT-S/14 then stop at three of twelve in nine cases of ten. What that lets through was found in
# float32, whose gate is 3, by making one gradient's error larger in every objective, until it is R times the
# reference's (2000 orders of 24 objectives; mean over 361 gradients, and the worst of them). At R = 3.25 10.5 % pass,
# with all twelve 10.2 (worst 47, 44); at 3.5 1.8, 1.6 (35, 25); at 4 0.21, 0.13 (19, 15); at 5 0.01, 0.00 (1.6, 0.6).
# Rounding that is wrong in some objectives only is missed more often.
SETTLED = 2 / 3


@dataclasses.dataclass
class Pooled:
    """The errors of every gradient, a dictionary by name for each objective, and what they say.

    Attributes:
      names: the gradients to compare, in order.
      dtype: the tested precision.
      foreign: whether the reference is, see `gates.ALLOWANCES`.
      exacts: the candidate's in float64, of the first objectives alone.
      reference_errors: the reference's in the tested precision.
      roundings: the candidate's there.
      fused: the reference's there with fused attention; empty unless that widens the gate.
      explanation: of the first divergence.
    """

    names: Sequence[str]
    dtype: DTypeLike
    foreign: bool
    exacts: list[Errors] = dataclasses.field(default_factory=list)
    reference_errors: list[Errors] = dataclasses.field(default_factory=list)
    roundings: list[Errors] = dataclasses.field(default_factory=list)
    fused: list[Errors] = dataclasses.field(default_factory=list)
    explanation: Explanation = dataclasses.field(default_factory=Explanation)

    @property
    def missing(self) -> tuple[str, ...]:
        """The gradients that the candidate does not show."""
        return tuple(name for name in self.names if not all(name in found for found in (*self.exacts, *self.roundings)))

    @property
    def wrong(self) -> bool:
        """Whether any gradient was beyond the semantic gate so far."""
        return any(not error.passes_semantic_gate for found in self.exacts for error in found.values())

    @property
    def passed(self) -> bool:
        """Whether no gradient is beyond the numerical gate so far."""
        return all(result.passes_numerical_gate for result in self.results())

    @property
    def settled(self) -> bool:
        """Whether more objectives are unlikely to change the verdict on any gradient.

        Of one that is wrong in float64, or not finite, nothing more is asked.
        """
        return all(
            result.rounding <= SETTLED * result.gate
            or not (result.exact.passes_semantic_gate and math.isfinite(result.rounding))
            for result in self.results()
        )

    def results(self) -> tuple[SiteResult, ...]:
        """One a gradient that the candidate shows, with the gate of all objectives, however many were asked."""
        gates = self._gates(self.reference_errors)
        for name, gate in self._gates(self.fused).items():
            # An error that is not finite would allow any other.
            if math.isfinite(gate):
                gates[name] = max(gates[name], gate)
        missing = set(self.missing)
        return tuple(
            SiteResult(
                name,
                oracles=Error(0.0, 0.0),
                exact=max(
                    (found[name] for found in self.exacts),
                    key=lambda error: (not error.passes_semantic_gate, error.rms),
                ),
                alone=None,
                rounding=_rms(self.roundings, name),
                reference_error=self._reference_error(self.reference_errors, name),
                gate=gates[name],
                incomparable=next((found[name].reason for found in self.roundings if found[name].reason), ""),
            )
            for name in self.names
            if name not in missing
        )

    def _gates(self, found: Sequence[Errors]) -> dict[str, float]:
        gates = {}
        for name in found[0] if found else ():
            # Of few objectives fewer elements carry the error, and the gate would be wider for it.
            carriers = LOOKS[-1] / len(found) * sum(errors[name].carriers for errors in found)
            reference_error = self._reference_error(found, name)
            gates[name] = numerical_gate(reference_error, self.dtype, carriers, backward=True, foreign=self.foreign)
        return gates

    def _reference_error(self, found: Sequence[Errors], name: str) -> float:
        return max(_rms(found, mate) for mate in _layer(name, self.names))


def _rms(found: Sequence[Errors], name: str) -> float:
    return root_mean_square(np.array([errors[name].rms for errors in found]))


def _layer(name: str, names: Sequence[str]) -> list[str]:
    """The gradients that one error of the reference serves: all parameters of a layer, any other by itself.

    A bias has too few elements to say what its own error typically is: over 33 of them the reference's was seen between
    half and twice its average. Its layer's kernel takes part in the same sums over all tokens.
    """
    layer, _, leaf = name.rpartition(".")
    if leaf not in ("bias", "kernel", "scale", "weight"):
        return [name]
    return [mate for mate in names if mate.rpartition(".")[0] == layer]
