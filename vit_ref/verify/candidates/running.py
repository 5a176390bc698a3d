"""Loads a declared model in float64, and chooses what runs it: PyTorch or JAX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.jax_candidate import JaxCandidate
from vit_ref.verify.candidates.loading import is_torch, load
from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.precision import FLOAT64

if TYPE_CHECKING:
    from vit_ref.verify.candidates.torch_candidate import TorchCandidate


def load_in_float64(declaration: Candidate, checkpoint: Path | None) -> Any:
    """Returns what the declaration's loader returns in float64; see `loading.load`."""
    with FLOAT64.active():
        return load(declaration, checkpoint, np.float64)


def implement(
    declaration: Candidate, outline: Outline, checkpoint: Path | None, loaded: Any
) -> JaxCandidate | TorchCandidate:
    """Returns the engine's view of what a loader returned; see `Declared`."""
    if not is_torch(loaded):
        return JaxCandidate(declaration, outline, checkpoint, loaded)
    from vit_ref.verify.candidates.torch_candidate import TorchCandidate

    return TorchCandidate(declaration, outline, checkpoint, loaded)
