"""`check_port`: everything that can be said of one port on one checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from vit_ref.errors import (
    InputError,
    MappingError,
    PartlyJudgedError,
    UndifferentiableError,
    UnsupportedByReferenceError,
)
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.declaration import Candidate, declared
from vit_ref.verify.candidates.jax_candidate import JaxCandidate
from vit_ref.verify.candidates.loading import find, is_torch, loaded
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.compare.backward import check_gradients
from vit_ref.verify.compare.behaviour import check_behaviour, require_repeatable
from vit_ref.verify.compare.forward import ParityReport, check_parity, hf_tensors
from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.compare.trace import Progress, precision_of, silent
from vit_ref.verify.environment import environment
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import Precision, named
from vit_ref.verify.references.choice import reference_for
from vit_ref.verify.results import CandidateReport, require_expectations
from vit_ref.weights import mapping
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.mapping import naming
from vit_ref.weights.origin import origin
from vit_ref.weights.pretrained import opened

# Images forward. Backward, one takes as much memory as four forward: 3.3 GB of a ViT-S/14, and two 5.6 GB.
# A port that mixes images on the way back is right on one; of this package's own model, which embedded cases judge on
# batches, one is enough.
FORWARD, BACKWARD, BACKWARD_OWN, BEHAVIOUR = 4, 2, 1, 2


def check_port(
    candidate: Candidate | Callable[..., Any] | str | None,
    checkpoint: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    ignore: Iterable[str] = (),
    precision: str | DTypeLike | Precision = "float32",
    reference: str = "flax",
    backward: bool = True,
    expected_failed_checks: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> CandidateReport:
    """Judges a port against reference and oracle, at every site that it shows, forward and backward.

    Args:
      candidate: a `Candidate`; a function from pixels (B, height, width, C) to logits (B, classes); "FILE.py" or
        "module:attribute" where one of these is; or None for this package's own model.
      checkpoint: a directory, file or hub id.
      images: a directory of photographs, preprocessed as the checkpoint asks; None for synthetic images.
      revision: of a hub id, as in `vit_ref.from_pretrained`.
      ignore: names or patterns of tensors in the checkpoint to leave behind, as in `vit_ref.from_pretrained`. A
        candidate's loader reads the files by itself.
      precision: whose rounding is judged: "float32", "tensorfloat32", "bfloat16", "mixed" or "float16", or a dtype of
        that name; `precision.PRECISIONS` says what each is.
      reference: who judges: "flax", "torch" or "numpy", the last forward only.
      backward: whether to judge gradients too.
      expected_failed_checks: pattern (`*`, `?`) of check names or sites -> why they fail. One that passes is an error.
      progress: told what is being done next.

    Returns:
      Every check with its status; `report.passed` is the verdict.

    Raises:
      PartlyJudgedError: nothing failed forward, and backward somebody cannot be used, as a reference that overflows.
      InputError: checkpoint, candidate, images or an expectation cannot be used, or the reference is not installed.
      TruncatedError: nothing of the candidate is in float64 when asked to be.
    """
    asked = named(precision)
    source, config = opened(checkpoint, revision=revision, ignore=ignore)
    read = origin(source)
    title = read.name
    with naming(source.path):
        port = prepare_candidate(candidate, config, source)
    pixels = pixels_for(config, images, FORWARD)
    if candidate is not None:
        require_repeatable(port, pixels[:1], progress=progress)
    judge = reference_for(config, hf_tensors(config, source), reference)
    forward = check_parity(title, config, source, pixels, port, asked, judge, progress=progress)
    several = BACKWARD_OWN if candidate is None else BACKWARD

    def measured() -> ParityReport:
        return check_gradients(
            f"{title}, backward", config, source, pixels[:several], port, asked, judge, progress=progress
        )

    gradients, reason, unjudged = judged(measured if backward else None)
    report = CandidateReport(
        title=title,
        checkpoint=read,
        candidate=port.name,
        reference=forward.reference,
        precision=forward.precision,
        forward=forward,
        backward=gradients,
        not_backward=reason,
        behaviour=check_behaviour(port, pixels[:BEHAVIOUR], progress=progress),
        expected_failed_checks=dict(expected_failed_checks or {}),
        environment=environment(asked),
        notes=port.notes,
    )
    require_expectations(report)
    return complete(report, unjudged)


def judged(measure: Callable[[], ParityReport] | None) -> tuple[ParityReport | None, str, bool]:
    """The report of the gradients, or why there is none, and whether that leaves a question open.

    Where the reference or the candidate has no backward pass there is nothing to judge. Where something else cannot be
    used there was, and who asked for it has no answer.

    Args:
      measure: measures them; None where nobody asked.
    """
    if measure is None:
        return None, "not asked for", False
    try:
        return measure(), "", False
    except (UnsupportedByReferenceError, UndifferentiableError) as error:
        return None, str(error), False
    except InputError as error:
        return None, str(error), True


def complete(report: CandidateReport, unjudged: bool) -> CandidateReport:
    """The report, if it is an answer: a failure is one whatever the gradients are.

    Raises:
      PartlyJudgedError: nothing failed, and gradients that were asked for could not be judged.
    """
    if unjudged and report.passed:
        raise PartlyJudgedError(report.not_backward, report)
    return report


def steps(*, backward: bool) -> int:
    """How often `check_port` tells its progress for a candidate that is right, and whose rounding is soon settled."""
    return 7 + (LOOKS[0] if backward else 0)


def prepare_candidate(
    candidate: Candidate | Callable[..., Any] | str | None, config: ViTConfig, source: Checkpoint
) -> Any:
    """The engine's view of whatever `check_port` takes for a candidate.

    Raises:
      MappingError: the checkpoint does not fit its configuration.
      CandidateError: the candidate cannot be used.
    """
    if candidate is None:
        return OwnCandidate(config, source)
    _require_fit(config, source)
    declaration = found(candidate)
    with precision_of(np.float64):
        port = loaded(declaration, source.path, np.float64)
    if is_torch(port):
        from vit_ref.verify.candidates.torch_candidate import TorchCandidate

        return TorchCandidate(declaration, config, source.path, port)
    return JaxCandidate(declaration, config, source.path, port)


# A block's number in a tensor's name.
_IN_A_BLOCK = re.compile(r"[./_]\d+[./]")


def _require_fit(config: ViTConfig, source: Checkpoint) -> None:
    """Says of the checkpoint what else would be blamed on the port, or on the judges, who take its tensors by name."""
    layout = mapping.detect(source.tensors)
    try:
        for _ in mapping.ported(source.tensors, config, layout):
            pass
    except MappingError as error:
        # What is left over outside the blocks, such as a pooler beside a head, nobody need load.
        faults = [fault for fault in error.faults if fault.kind != "unexpected" or _IN_A_BLOCK.search(fault.name)]
        if faults:
            raise MappingError(faults, layout.name) from None


def found(candidate: Candidate | Callable[..., Any] | str) -> Candidate:
    """The declaration that a person gave, or said where to find."""
    if isinstance(candidate, str):
        return find(candidate)
    return declared(candidate, getattr(candidate, "__name__", "candidate"))
