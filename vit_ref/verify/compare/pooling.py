"""Pools the errors of gradients over objectives, and decides when there are enough objectives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.gates import (
    SEMANTIC_MAX,
    SEMANTIC_RMS,
    Error,
    Errors,
    float64_noise,
    numerical_gate,
    root_mean_square,
)
from vit_ref.verify.results import Explanation, SiteResult

# If every gradient's error is within this part of its gate, the remaining objectives are skipped. On a trained ViT-S/14
# a right candidate then stops after three of twelve objectives in nine cases of ten.
#
# Skipping lets a few more wrong gradients pass. This was measured in float32, whose gate is 3. One gradient's error was
# multiplied in every objective until it was R times the reference's, in 2000 orders of 24 objectives. The share that
# passes, as the mean over 361 gradients and for the worst of them:
#
#   R      with skipping     with all twelve
#   3.25   10.5 % (47 %)     10.2 % (44 %)
#   3.5    1.8 % (35 %)      1.6 % (25 %)
#   4      0.21 % (19 %)     0.13 % (15 %)
#   5      0.01 % (1.6 %)    0.00 % (0.6 %)
#
# Rounding that is wrong in some objectives only is missed more often.
SETTLED = 2 / 3


@dataclasses.dataclass
class Pooled:
    """The errors of every gradient, by name in one dictionary for each objective.

    Attributes:
      names: the gradients to compare, in order.
      dtype: the tested precision.
      foreign: whether the reference runs outside jax, see `gates.ALLOWANCES`.
      exacts: the candidate's errors in float64, for the first objectives only.
      reference_errors: the reference's errors in the tested precision.
      roundings: the candidate's errors in the tested precision.
      fused: the reference's errors in the tested precision with fused attention; empty if they do not widen the gate.
      in_float32: the reference's errors in float32, if an error in float64 made it necessary to measure them.
      explanation: the explanation of the first divergence.
    """

    names: Sequence[str]
    dtype: DTypeLike
    foreign: bool
    exacts: list[Errors] = dataclasses.field(default_factory=list)
    reference_errors: list[Errors] = dataclasses.field(default_factory=list)
    roundings: list[Errors] = dataclasses.field(default_factory=list)
    fused: list[Errors] = dataclasses.field(default_factory=list)
    in_float32: list[Errors] = dataclasses.field(default_factory=list)
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
    def suspect(self) -> bool:
        """Whether any gradient differs by more than is usual in float64. Rounding may explain it."""
        return any(e.rms > SEMANTIC_RMS or e.max > SEMANTIC_MAX for found in self.exacts for e in found.values())

    def excuse(self, in_float32: Errors) -> None:
        """Notes what rounding explains in float64 of the errors there.

        The reference's errors are pooled for it: where few terms carry an error, one objective's may be small by luck.

        Args:
          in_float32: the reference's errors in float32, of one more objective.
        """
        self.in_float32.append(in_float32)
        # Not a layer's: its kernel may be ill-conditioned, and its bias not.
        noise = {name: float64_noise(_rms(self.in_float32, name)) for name in self.names}
        self.exacts = [
            {name: error._replace(noise=noise.get(name, 0.0)) for name, error in found.items()} for found in self.exacts
        ]

    @property
    def passed(self) -> bool:
        """Whether no gradient is beyond the numerical gate so far."""
        return all(result.passes_numerical_gate for result in self.results())

    @property
    def settled(self) -> bool:
        """Whether more objectives are unlikely to change the verdict on any gradient.

        The verdict on a gradient that is wrong in float64, or not finite, cannot change.
        """
        return all(
            result.rounding <= SETTLED * result.gate
            or not (result.exact.passes_semantic_gate and math.isfinite(result.rounding))
            for result in self.results()
        )

    def results(self) -> tuple[SiteResult, ...]:
        """Returns one result for each gradient that the candidate shows.

        Its gate is that of all objectives, also if some were skipped.
        """
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
            # In few objectives fewer elements carry the error. That alone would widen the gate.
            carriers = LOOKS[-1] / len(found) * sum(errors[name].carriers for errors in found)
            reference_error = self._reference_error(found, name)
            gates[name] = numerical_gate(reference_error, self.dtype, carriers, backward=True, foreign=self.foreign)
        return gates

    def _reference_error(self, found: Sequence[Errors], name: str) -> float:
        return max(_rms(found, mate) for mate in _layer(name, self.names))


def _rms(found: Sequence[Errors], name: str) -> float:
    return root_mean_square(np.array([errors[name].rms for errors in found]))


_OF_A_LAYER = ("bias", "kernel", "scale", "weight")


def _layer(name: str, names: Sequence[str]) -> list[str]:
    """Returns the gradients that share one error of the reference: all parameters of a layer, or the gradient alone.

    A bias has too few elements to show the typical size of its error. Over 33 elements the reference's error varied
    between half and twice its average. The layer's kernel takes part in the same sums over all tokens.
    """
    layer, dot, leaf = name.rpartition(".")
    if leaf not in _OF_A_LAYER:
        return [name]
    # Without a layer, only a bias has a mate for certain.
    leaves = _OF_A_LAYER if layer else {"bias": ("bias", "kernel", "weight")}.get(leaf, (leaf,))
    mates = {f"{layer}{dot}{each}" for each in leaves}
    return [mate for mate in names if mate in mates]
