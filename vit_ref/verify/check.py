"""`check_port`: everything that can be said of one port on one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from vit_ref import checkpoint as checkpoints
from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.pretrained import configuration
from vit_ref.verify.behaviour import check_behaviour
from vit_ref.verify.candidate import OwnCandidate
from vit_ref.verify.environment import environment
from vit_ref.verify.flaxvit import UnsupportedByReferenceError
from vit_ref.verify.gradients import check_gradients
from vit_ref.verify.parity import ParityReport, check_parity
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.port_report import PortReport, require_expectations
from vit_ref.verify.ports.declaration import Candidate, declared
from vit_ref.verify.ports.jaxport import JaxPort
from vit_ref.verify.ports.loading import find
from vit_ref.verify.trace import Progress, silent

# Images forward. Backward, one takes as much memory as four forward: 3.3 GB of a ViT-S/14, and 0.9 GB more with two.
FORWARD, BACKWARD, BEHAVIOUR = 4, 1, 2


def check_port(
    candidate: Candidate | Callable[..., Any] | str | None,
    checkpoint: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    precision: DTypeLike = np.float32,
    backward: bool = True,
    expected_failures: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> PortReport:
    """Judges a port against reference and oracle, at every site that it shows, forward and backward.

    Args:
      candidate: a `Candidate`; a function from pixels (B, height, width, C) to logits (B, classes); "FILE.py" or
        "module:attribute" where one of these is; or None for this package's own model.
      checkpoint: a directory, file or hub id.
      images: a directory of photographs, preprocessed as the checkpoint asks; None for synthetic images.
      precision: the dtype whose rounding is judged.
      backward: whether to judge gradients too.
      expected_failures: pattern (`*`, `?`) of check names or sites -> why they fail. One that passes is an error.
      progress: told what is being done next.

    Returns:
      Every check with its status; `report.passed` is the verdict.

    Raises:
      InputError: checkpoint, candidate, images or an expectation cannot be used, or the reference is not installed.
      TruncatedError: the candidate does not compute in float64 when asked to.
    """
    source = checkpoints.read(checkpoint)
    config = configuration(source)
    port = port_for(candidate, config, source)
    pixels = pixels_for(config, images, FORWARD)
    title = source.path.resolve().name
    forward = check_parity(title, config, source, pixels, port, precision, progress=progress)
    gradients, reason = _gradients(title, config, source, pixels, port, precision, progress) if backward else (None, "")
    report = PortReport(
        title=title,
        candidate=port.name,
        reference=forward.reference,
        precision=forward.precision,
        forward=forward,
        backward=gradients,
        not_backward=reason or ("" if gradients else "not asked for"),
        behaviour=check_behaviour(port, pixels[:BEHAVIOUR], progress=progress),
        expected_failures=dict(expected_failures or {}),
        environment=environment(),
    )
    require_expectations(report)
    return report


def port_for(candidate: Candidate | Callable[..., Any] | str | None, config: ViTConfig, source: Checkpoint) -> Any:
    """The engine's view of whatever `check_port` takes for a candidate."""
    return OwnCandidate(config, source) if candidate is None else JaxPort(found(candidate), config, Path(source.path))


def found(candidate: Candidate | Callable[..., Any] | str) -> Candidate:
    """The declaration that a person gave, or said where to find."""
    if isinstance(candidate, str):
        return find(candidate)
    return declared(candidate, getattr(candidate, "__name__", "candidate"))


def _gradients(
    title: str, config: ViTConfig, source: Checkpoint, pixels: Any, port: Any, precision: DTypeLike, progress: Progress
) -> tuple[ParityReport | None, str]:
    try:
        title = f"{title}, backward"
        return check_gradients(title, config, source, pixels[:BACKWARD], port, precision, progress=progress), ""
    except UnsupportedByReferenceError as error:
        return None, str(error)
    except jax.errors.JAXTypeError as error:
        return None, f"jax cannot trace it ({type(error).__name__}), so it cannot be differentiated"
