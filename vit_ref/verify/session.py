"""One check of a ViT, for the command line, `check_port`, pytest and `--stream`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError, MappingError, OraclesDifferError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cache import originals
from vit_ref.verify.cache.opening import opened
from vit_ref.verify.cache.reference import KeptReference, has_values, is_known, unkept
from vit_ref.verify.cache.shelf import Shelf
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.loading import find_declaration
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.candidates.running import implement, load_in_float64
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.compare.backward import compare_backward
from vit_ref.verify.compare.behaviour import check_behaviour, require_repeatable
from vit_ref.verify.compare.first_look import FirstLook, OnDivergence, describe_divergence, ignore_divergence
from vit_ref.verify.compare.forward import compare_forward, never
from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.compare.protocols import Reference, Runnable
from vit_ref.verify.compare.trace import Progress, silent
from vit_ref.verify.judgement import Judgement, OnPart, ignore_part
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import Precision, resolve_precision
from vit_ref.verify.problem import Problem
from vit_ref.verify.references.choice import (
    REFERENCES,
    NumpyReference,
    import_module,
    reference_for,
    with_fused_attention,
)
from vit_ref.verify.results import Behaviour, CandidateReport, ParityReport
from vit_ref.verify.vit import ViTExplainer, hf_tensors, problem_of
from vit_ref.weights import mapping
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.cut import open_cut
from vit_ref.weights.mapping import name_checkpoint_in_errors
from vit_ref.weights.origin import Extent, Origin, find_origin
from vit_ref.weights.pretrained import open_checkpoint

if TYPE_CHECKING:
    from vit_ref.verify.candidates.jax_candidate import JaxCandidate
    from vit_ref.verify.candidates.torch_candidate import TorchCandidate

# The forms in which a caller may give a candidate. None stands for this package's own model.
Given = Candidate | Callable[..., Any] | str | None

# Numbers of images. One image backward takes as much memory as four forward: 3.3 GB for a ViT-S/14. Two take 5.6 GB.
# A candidate that mixes images in its backward pass would pass on one image. One image is enough for this package's own
# model, because embedded cases test it on batches.
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
    cache: bool = True,
    quick: bool = False,
    fail_fast: bool = False,
    on_part: OnPart = ignore_part,
    on_divergence: OnDivergence = ignore_divergence,
    progress: Progress = silent,
) -> CandidateReport:
    """Checks a candidate against reference and oracle, at every site that it shows, forward and backward.

    Args:
      candidate: one of these:

        - a `Candidate`;
        - a function from pixels (B, height, width, C) to logits (B, classes);
        - "FILE.py" or "module:attribute", which holds one of these;
        - None for this package's own model.
      checkpoint: a directory, file or hub id.
      images: a directory of photographs, which are preprocessed as the checkpoint says; None for synthetic images.
      revision: a revision of a hub id, as in `vit_ref.from_pretrained`.
      ignore: names or patterns of tensors in the checkpoint to leave out, as in `vit_ref.from_pretrained`. A
        candidate's loader reads the files itself.
      precision: the precision whose rounding is tested: "float32", "tensorfloat32", "bfloat16", "mixed" or "float16",
        or a dtype of that name. `precision.PRECISIONS` describes each.
      reference: the reference that decides: "flax", "torch" or "numpy". NumPy has no backward pass.
      backward: whether to check gradients too.
      expected_failed_checks: pattern (`*`, `?`) of check names or sites -> the reason why they fail. An expected
        failure that passes is an error. It cannot be combined with `quick`, which renumbers blocks.
      cache: whether to keep compiled programs, and results of reference and oracle, on disk for later runs. The
        numbers are the same without it. The environment variable VIT_REF_CACHE names its directory, or is "off".
      quick: whether to check a cut of the checkpoint only: its first and last block, a small grid of positions, and
        small images. The candidate loads the cut, whose `config.json` says so. The report is no verdict on the whole,
        and says what was not verified. See `vit_ref.weights.cut`.
      fail_fast: whether to end the run after the first part that fails: forward, backward, behaviour. A wrong formula
        ends it before rounding is measured. The report names what was not run.
      on_part: gets the report so far as soon as the forward pass was compared, and again after the gradients. It says
        of the parts that are still to come that they were not run yet.
      on_divergence: gets a line about the first wrong formula, before its cause is looked for. If an earlier run has
        left the reference's values in the cache, one image decides, before the comparison of all begins.
      progress: gets a description of each next step.

    Returns:
      Every check with its status. `report.passed` is the verdict.

    Raises:
      PartlyJudgedError: nothing failed forward, but the gradients cannot be checked: the reference may overflow.
      InputError: checkpoint, candidate, images or an expectation cannot be used, or the reference is not installed.
      TruncatedError: the candidate computes nothing in float64 when it should.
    """
    if quick and expected_failed_checks:
        raise InputError(
            f"quick renumbers blocks, so {next(iter(expected_failed_checks))!r} of expected_failed_checks may cover"
            " another block: leave out quick or expected_failed_checks"
        )
    resolved = resolve_precision(precision)
    source, config = open_checkpoint(checkpoint, revision=revision, ignore=ignore, lazy=quick)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(opened(cache))
        pixels, origin = pixels_for(config, images, FORWARD), find_origin(source)
        notes, extent = Session.notes, Session.cut
        stack.enter_context(name_checkpoint_in_errors(source.path))
        if quick:
            cut = stack.enter_context(open_cut(source, config))
            source, config, notes, extent = cut.source, cut.config, (cut.note,), cut.extent
            pixels = pixels_for(config, None, FORWARD) if images is None else cut.crop(pixels)
        foreign = candidate is not None
        several = BACKWARD if foreign else BACKWARD_OWN
        shelf = tensors = None
        if store is not None and reference in REFERENCES:
            tensors = hf_tensors(config, source)
            shelf = Shelf.of(store, reference, repr(config), tensors, foreign=foreign)
            # A run that ends at a wrong formula needs no more of the reference than its values.
            known = fail_fast and has_values(shelf, pixels)
            if foreign and not (known or is_known(shelf, pixels, resolved, pixels[:several] if backward else None)):
                # A candidate may replace parts of it. What the cache keeps has to be the reference itself.
                originals.remember_after(partial(import_module, reference))
        declaration = None if candidate is None else find_declaration(candidate)
        if quick:
            stack.enter_context(_advising(cut.changes))
        session = Session(
            config,
            source,
            pixels,
            _prepare(declaration, config, source),
            resolved,
            reference,
            title=f"a cut of {origin.name}" if quick else origin.name,
            origin=origin,
            notes=notes,
            cut=extent,
            images_backward=several,
            shelf=shelf,
            tensors=tensors,
            on_divergence=on_divergence,
            progress=progress,
        )
        if foreign:
            session.require_repeatable()
        return session.check(
            backward=backward, expected_failed_checks=expected_failed_checks, fail_fast=fail_fast, on_part=on_part
        )


@contextlib.contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Adds advice to a `CandidateError` raised within it."""
    try:
        yield
    except CandidateError as error:
        raise CandidateError(f"{error}; {advice}") from error


class Session(Judgement):
    """One check of a ViT and its parts.

    Args:
      config: the model's configuration.
      source: the checkpoint.
      pixels: float32 images (B, height, width, C).
      candidate: the implementation under test.
      precision: the precision whose rounding is measured, see `precision.resolve_precision`.
      reference: the reference that decides: one of `choice.REFERENCES` by name, or one that holds the weights already.
      title: name of the checkpoint or case, for reports; by default the name of the checkpoint's files.
      origin: the origin to report; by default that of the checkpoint's files.
      notes: notes for the report.
      cut: what is checked of the checkpoint, if it was cut; None if all of it is checked.
      images_backward: the number of images for the backward pass; None for all.
      shelf: the part of the cache that keeps what this reference computes with this checkpoint; None for no cache. It
        keeps nothing of a reference that is not chosen by name.
      tensors: the checkpoint's tensors as `hf_tensors` returns them, if the caller has them already.
      on_divergence: see `check_port`.
      progress: gets a description of each next step.
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
        origin: Origin | None = None,
        notes: tuple[str, ...] = (),
        cut: Extent | None = None,
        images_backward: int | None = None,
        shelf: Shelf | None = None,
        tensors: dict[str, NDArray] | None = None,
        on_divergence: OnDivergence = ignore_divergence,
        progress: Progress = silent,
    ):
        self.config, self.source, self.pixels, self.candidate = config, source, pixels, candidate
        self.precision, self.notes, self._origin = resolve_precision(precision), notes, origin
        self.title, self.cut = self.origin.name if title is None else title, cut
        self.images_backward, self.progress = images_backward, progress
        self._reference = reference
        self._shelf = shelf if isinstance(reference, str) else None
        self._tensors = tensors
        self.on_divergence = on_divergence

    @cached_property
    def origin(self) -> Origin:
        """The checkpoint's name and the digest of its weights."""
        return self._origin or find_origin(self.source)

    @cached_property
    def tensors(self) -> dict[str, NDArray]:
        """The checkpoint's tensors under the names that reference and oracle read, see `hf_tensors`."""
        return hf_tensors(self.config, self.source) if self._tensors is None else self._tensors

    @cached_property
    def reference(self) -> Reference:
        """The reference, filled from the checkpoint.

        Raises:
          InputError: it is not installed, or the checkpoint does not fit it.
        """
        given = self._reference
        if not isinstance(given, str):
            return given
        if self._shelf is None:
            return reference_for(self.config, self.tensors, given)

        def build() -> Reference:
            originals.remember_after(partial(import_module, given))
            return reference_for(self.config, self.tensors, given)

        return KeptReference(self._shelf, build)

    def _kept(self, problem: Problem) -> Shelf | None:
        """Returns the errors that earlier runs have kept for this problem; None without a cache."""
        return self._shelf and self._shelf.for_inputs(problem.inputs, self.precision)

    def require_repeatable(self) -> None:
        """Checks that two runs of the candidate on one image are equal, see `behaviour.require_repeatable`.

        If the cache has the reference's values, the candidate's are compared with them meanwhile.
        """
        look = self._first_look()
        see = None if look is None else look.see
        require_repeatable(self.candidate, self.pixels[:1], look=see, progress=self.progress)
        if look and look.divergence:
            self.on_divergence(describe_divergence(self.candidate.name, *look.divergence, "on the first image"))
            self.on_divergence = ignore_divergence  # once is enough

    def _first_look(self) -> FirstLook | None:
        if self._shelf is None or not has_values(self._shelf, self.pixels):
            return None
        problem, reference = problem_of(self.config, self.pixels), self.reference
        agrees = self._shelf.for_inputs(self.pixels, self.precision).find("oracle") is not None
        truth = reference.recall(self.pixels) if agrees and isinstance(reference, KeptReference) else None
        return None if truth is None else FirstLook({site: value[:1] for site, value in truth.items()}, problem.names)

    def forward(self, stops: Callable[[str], bool] = never) -> ParityReport:
        """Implements `Judgement.forward`."""
        problem = problem_of(self.config, self.pixels)
        try:
            return compare_forward(
                self.title,
                problem,
                self.reference,
                NumpyReference(self.config, self.tensors),
                self.candidate,
                self.precision,
                explainer=ViTExplainer(self.config, self.tensors, problem),
                kept=self._kept(problem),
                stops=stops,
                on_divergence=self.on_divergence,
                on_trace=self.keep_output,
                runs_nearby=unkept,
                progress=self.progress,
            )
        except OraclesDifferError:
            if isinstance(self.reference, KeptReference):
                self.reference.forget(problem.inputs)
            raise

    def backward(self) -> ParityReport:
        """Compares every gradient, see `compare_backward`."""
        problem = problem_of(self.config, self.pixels[: self.images_backward])
        claims = self.candidate.claims
        probabilities = {site for site in problem.shapes if site.endswith(".attn.probs")}
        # A candidate that does not show its probabilities may use a fused kernel.
        hides = claims is not None and not probabilities <= claims
        return compare_backward(
            f"{self.title}, backward",
            problem,
            self.reference,
            self.candidate,
            self.precision,
            explainer=ViTExplainer(self.config, {}, problem),
            fuse=with_fused_attention if hides else None,
            kept=self._kept(problem),
            progress=self.progress,
        )

    def given(self) -> dict[str, NDArray]:
        """Implements `Judgement.given`."""
        return {"the images": self.pixels, **self.source.tensors}

    def behaviour(self) -> tuple[Behaviour, ...]:
        """Runs the candidate in ways that must agree, see `check_behaviour`."""
        # Four images take longer than two, but a pass in jax is compiled for four already.
        number = FORWARD if self.candidate.compiles else BEHAVIOUR
        tapped = self.tapped if len(self.pixels) <= number else None  # of all images
        return check_behaviour(self.candidate, self.pixels[:number], tapped=tapped, progress=self.progress)


def count_steps(*, backward: bool) -> int:
    """Returns how often `check_port` reports progress for a right candidate whose rounding settles at once."""
    return 7 + (LOOKS[0] if backward else 0)


def prepare_candidate(given: Given, config: ViTConfig, source: Checkpoint) -> Runnable:
    """Returns the engine's view of a candidate.

    Args:
      given: see `check_port`.
      config: the model's configuration.
      source: the checkpoint.

    Raises:
      MappingError: the checkpoint does not fit its configuration.
      CandidateError: the candidate cannot be used.
    """
    return _prepare(None if given is None else find_declaration(given), config, source)


def _prepare(declaration: Candidate | None, config: ViTConfig, source: Checkpoint) -> Runnable:
    return OwnCandidate(config, source) if declaration is None else load_candidate(declaration, config, source)


def load_candidate(declaration: Candidate, config: ViTConfig, source: Checkpoint) -> JaxCandidate | TorchCandidate:
    """Loads a declared candidate in float64. `prepare_candidate` describes the errors."""
    _require_fit(config, source)
    loaded = load_in_float64(declaration, source.path)
    return implement(declaration, ViTOutline(config), source.path, loaded)


# A block's number in a tensor's name.
_IN_A_BLOCK = re.compile(r"[./_]\d+[./]")


def _require_fit(config: ViTConfig, source: Checkpoint) -> None:
    """Checks the checkpoint, so that its faults are not reported as the candidate's or a reference's."""
    layout = mapping.detect(source.tensors)
    try:
        for _ in mapping.port_each(source.tensors, config, layout):
            pass
    except MappingError as error:
        # Left-over tensors outside the blocks, such as a pooler beside a head, do no harm.
        faults = [fault for fault in error.faults if fault.kind != "unexpected" or _IN_A_BLOCK.search(fault.name)]
        if faults:
            raise MappingError(faults, layout.name) from None
