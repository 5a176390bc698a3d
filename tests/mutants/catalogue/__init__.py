"""The catalogue: every deliberate bug, by theme."""

from __future__ import annotations

from tests.mutants.catalogue import (
    activation,
    attention,
    norm,
    patches,
    pooling,
    positions,
    precision,
    preprocessing,
    residual,
    training,
    weights,
)
from tests.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *patches.MUTANTS,
    *positions.MUTANTS,
    *norm.MUTANTS,
    *attention.MUTANTS,
    *activation.MUTANTS,
    *residual.MUTANTS,
    *pooling.MUTANTS,
    *weights.MUTANTS,
    *precision.MUTANTS,
    *training.MUTANTS,
    *preprocessing.MUTANTS,
)
