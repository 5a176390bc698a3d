"""A run's directory: the names in it, and whether a run may begin there. It imports neither jax nor flax."""

from __future__ import annotations

import os
from pathlib import Path

from vit_ref.errors import InputError

RECIPE, CHECKPOINTS, MODEL = "run.json", "checkpoints", "model"
METRICS, TIMING, TENSORBOARD = "metrics.jsonl", "timing.jsonl", "tensorboard"


def require_free(out: Path, *, resume: bool) -> None:
    """Checks before any work that a run overwrites nothing.

    Args:
      out: the run's directory, which need not be there yet.
      resume: whether to go on with the run that is in it.

    Raises:
      InputError: another run is in it, or files are there that a run would overwrite.
    """
    if os.path.lexists(out / RECIPE):
        if not resume:
            raise InputError(f"{out}: it holds a run already: continue with --resume, or give another directory")
        return
    for name in (CHECKPOINTS, MODEL, METRICS, TIMING):
        if os.path.lexists(out / name):
            raise InputError(f"{out / name}: it exists and would be overwritten: give another directory")
