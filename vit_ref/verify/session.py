"""One check of a ViT, prepared once for the command line, `check_port`, pytest and `--stream` alike."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.loading import find_declaration
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.candidates.running import implement, load_in_float64
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.compare.backward import compare_backward
from vit_ref.verify.compare.behaviour import check_behaviour, require_repeatable
from vit_ref.verify.compare.forward import compare_forward
from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.compare.protocols import Reference, Runnable
from vit_ref.verify.compare.trace import Progress, silent
from vit_ref.verify.judgement import Judgement
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import Precision, resolve_precision
from vit_ref.verify.references.choice import NumpyReference, reference_for, with_fused_attention
from vit_ref.verify.results import Behaviour, CandidateReport, ParityReport
from vit_ref.verify.vit import ViTExplainer, hf_tensors, problem_of
from vit_ref.weights import mapping
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.mapping import name_checkpoint_in_errors
from vit_ref.weights.origin import Origin, find_origin
from vit_ref.weights.pretrained import open_checkpoint

if TYPE_CHECKING:
    from vit_ref.verify.candidates.jax_candidate import JaxCandidate
    from vit_ref.verify.candidates.torch_candidate import TorchCandidate

# What a person may give for a candidate; None stands for this package's own model.
Given = Candidate | Callable[..., Any] | str | None

# Images forward. Backward, one takes as much memory as four forward: 3.3 GB of a ViT-S/14, and two 5.6 GB.
# A candidate that mixes images in its backward pass is right on one. Of this package's own model, which embedded cases
# check on batches, one is enough.
FORWARD, BACKWARD, BACKWARD_OWN, BEHAVIOUR = 4, 2, 1, 2


def check_port(
    candidate: Given,
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
    """Checks a candidate against reference and oracle, at every site that it shows, forward and backward.

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
    resolved = resolve_precision(precision)
    source, config = open_checkpoint(checkpoint, revision=revision, ignore=ignore)
    with name_checkpoint_in_errors(source.path):
        prepared = prepare_candidate(candidate, config, source)
    pixels = pixels_for(config, images, FORWARD)
    if candidate is not None:
        require_repeatable(prepared, pixels[:1], progress=progress)
    several = BACKWARD_OWN if candidate is None else BACKWARD
    session = Session(config, source, pixels, prepared, resolved, reference, images_backward=several, progress=progress)
    return session.check(backward=backward, expected_failed_checks=expected_failed_checks)


class Session(Judgement):
    """What one check of a ViT takes, and the parts of the check.

    Args:
      config: the model's configuration.
      source: the checkpoint.
      pixels: float32 images (B, height, width, C).
      candidate: the implementation under test.
      precision: the precision whose rounding is measured, see `precision.resolve_precision`.
      reference: what decides: one of `choice.REFERENCES` by name, or one that is filled already.
      title: which checkpoint or case, for reports; by default the name of the checkpoint's files.
      images_backward: how many of the images go backward; None for all.
      progress: told what is being done next.
    """

    def __init__(
        self,
        config: ViTConfig,
        source: Checkpoint,
        pixels: NDArray,
        candidate: Runnable,
        precision: str | DTypeLike | Precision = "float32",
        reference: str | Reference = "flax",
        *,
        title: str | None = None,
        images_backward: int | None = None,
        progress: Progress = silent,
    ):
        self.config, self.source, self.pixels, self.candidate = config, source, pixels, candidate
        self.precision = resolve_precision(precision)
        self.title = self.origin.name if title is None else title
        self.images_backward, self.progress = images_backward, progress
        self._reference = reference

    @cached_property
    def origin(self) -> Origin:
        """Which checkpoint that is, and the digest of its weights."""
        return find_origin(self.source)

    @cached_property
    def tensors(self) -> dict[str, NDArray]:
        """The checkpoint's tensors as reference and oracle read them, see `hf_tensors`."""
        return hf_tensors(self.config, self.source)

    @cached_property
    def reference(self) -> Reference:
        """The reference, filled from the checkpoint.

        Raises:
          InputError: it is not installed, or the checkpoint does not fit it.
        """
        given = self._reference
        return reference_for(self.config, self.tensors, given) if isinstance(given, str) else given

    def forward(self) -> ParityReport:
        """Compares every site, see `compare_forward`."""
        problem = problem_of(self.config, self.pixels)
        return compare_forward(
            self.title,
            problem,
            self.reference,
            NumpyReference(self.config, self.tensors),
            self.candidate,
            self.precision,
            explainer=ViTExplainer(self.config, self.tensors, problem),
            progress=self.progress,
        )

    def backward(self) -> ParityReport:
        """Compares every gradient, see `compare_backward`."""
        problem = problem_of(self.config, self.pixels[: self.images_backward])
        claims = self.candidate.claims
        probabilities = {site for site in problem.shapes if site.endswith(".attn.probs")}
        # Attention may be a fused kernel; one that shows its probabilities computes with them.
        hides = claims is not None and not probabilities <= claims
        return compare_backward(
            f"{self.title}, backward",
            problem,
            self.reference,
            self.candidate,
            self.precision,
            explainer=ViTExplainer(self.config, {}, problem),
            fuse=with_fused_attention if hides else None,
            progress=self.progress,
        )

    def given(self) -> dict[str, NDArray]:
        """See `Judgement.given`."""
        return {"the images": self.pixels, **self.source.tensors}

    def behaviour(self) -> tuple[Behaviour, ...]:
        """Runs the candidate in ways that must agree, see `check_behaviour`."""
        return check_behaviour(self.candidate, self.pixels[:BEHAVIOUR], progress=self.progress)


def count_steps(*, backward: bool) -> int:
    """How often `check_port` tells its progress for a candidate that is right, and whose rounding is soon settled."""
    return 7 + (LOOKS[0] if backward else 0)


def prepare_candidate(given: Given, config: ViTConfig, source: Checkpoint) -> Runnable:
    """The engine's view of whatever `check_port` takes for a candidate.

    Raises:
      MappingError: the checkpoint does not fit its configuration.
      CandidateError: the candidate cannot be used.
    """
    return OwnCandidate(config, source) if given is None else load_candidate(given, config, source)


def load_candidate(
    given: Candidate | Callable[..., Any] | str, config: ViTConfig, source: Checkpoint
) -> JaxCandidate | TorchCandidate:
    """Loads a declared candidate in float64; see `prepare_candidate`."""
    _require_fit(config, source)
    declaration = find_declaration(given)
    loaded = load_in_float64(declaration, source.path)
    return implement(declaration, ViTOutline(config), source.path, loaded)


# A block's number in a tensor's name.
_IN_A_BLOCK = re.compile(r"[./_]\d+[./]")


def _require_fit(config: ViTConfig, source: Checkpoint) -> None:
    """Says of the checkpoint what would else be blamed on the candidate, or on the references."""
    layout = mapping.detect(source.tensors)
    try:
        for _ in mapping.port_each(source.tensors, config, layout):
            pass
    except MappingError as error:
        # What is left over outside the blocks, such as a pooler beside a head, nobody need load.
        faults = [fault for fault in error.faults if fault.kind != "unexpected" or _IN_A_BLOCK.search(fault.name)]
        if faults:
            raise MappingError(faults, layout.name) from None
