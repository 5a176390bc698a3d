"""One comparison of a candidate with a declared reference."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError, UnjudgedError
from vit_ref.verify.cache.opening import opened
from vit_ref.verify.candidates.declaration import Candidate, takes
from vit_ref.verify.candidates.feeding import name_input
from vit_ref.verify.candidates.loading import find_declaration, is_torch, load
from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.running import implement, load_in_float64
from vit_ref.verify.candidates.table import claimed
from vit_ref.verify.compare.backward import compare_backward
from vit_ref.verify.compare.behaviour import check_behaviour, require_repeatable
from vit_ref.verify.compare.first_look import OnDivergence, ignore_divergence
from vit_ref.verify.compare.forward import compare_forward, never
from vit_ref.verify.compare.inputs import copy_inputs, count_rows, is_float, take_rows
from vit_ref.verify.compare.objectives import LOOKS
from vit_ref.verify.compare.trace import Progress, passing, require_floats, silent
from vit_ref.verify.gates import error
from vit_ref.verify.judgement import Judgement, OnPart, ignore_part
from vit_ref.verify.pairs.discovery import Blank, discover
from vit_ref.verify.pairs.explainer import PairExplainer
from vit_ref.verify.pairs.given import Given as GivenInputs
from vit_ref.verify.pairs.given import find_inputs
from vit_ref.verify.pairs.outline import OUTPUT
from vit_ref.verify.pairs.parameters import match_parameters
from vit_ref.verify.pairs.truth import (
    digest_of,
    note_constants,
    require_same_attention,
    require_same_parts,
    require_same_weights,
    require_unchanged,
)
from vit_ref.verify.precision import FLOAT64, Precision, resolve_precision
from vit_ref.verify.problem import Problem
from vit_ref.verify.results import Behaviour, CandidateReport, ParityReport
from vit_ref.weights.origin import Origin, find_origin_of

# In this precision parameters are float32 and products bfloat16. Each model decides what else it rounds.
MIXED = "mixed"
# The forms in which a caller may give either side.
Given = Candidate | Callable[..., Any] | str


def compare(
    reference: Given,
    candidate: Given,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    inputs: GivenInputs = None,
    precision: str | DTypeLike | Precision = "float32",
    backward: bool = True,
    expected_failed_checks: Mapping[str, str] | None = None,
    seed: int = 0,
    cache: bool = True,
    fail_fast: bool = False,
    on_part: OnPart = ignore_part,
    on_divergence: OnDivergence = ignore_divergence,
    progress: Progress = silent,
) -> CandidateReport:
    """Compares a candidate with a reference, in any framework each, at every site that both show.

    The reference is the only truth, because no oracle knows what it computes. It is refused in these cases:

    - Two runs on the same inputs give different outputs.
    - It has other weights when it is loaded again.
    - It does not compute in float64.
    - It is not finite in float64.
    - Its implementations of attention differ.

    Args:
      reference: a `Reference`; a function; or "FILE.py" or "module:attribute", which holds one of these.
      candidate: a `Candidate`, or one of the other forms above.
      checkpoint: the path that both sides' `load` gets; None if neither needs one.
      inputs: arrays by name, or the path of an `.npz` file with them; None for those that `Reference.inputs` makes.
      precision: the precision whose rounding is tested; see `check_port`.
      backward: whether to check gradients too.
      expected_failed_checks: see `check_port`.
      seed: the argument of `Reference.inputs`.
      cache: whether to keep compiled programs on disk for later runs; see `check_port`.
      fail_fast: see `check_port`.
      on_part: see `check_port`.
      on_divergence: see `check_port`.
      progress: gets a description of each next step.

    Returns:
      Every check with its status. `report.passed` is the verdict.

    Raises:
      UnjudgedError: the reference cannot decide, for example because it is not finite.
      PartlyJudgedError: nothing failed forward, but the gradients cannot be checked.
      InputError: a side, the inputs or an expectation cannot be used.
    """
    with opened(cache):
        session = PairSession(
            reference, candidate, checkpoint, inputs=inputs, precision=precision, seed=seed, progress=progress
        )
        session.on_divergence = on_divergence
        return session.check(
            backward=backward, expected_failed_checks=expected_failed_checks, fail_fast=fail_fast, on_part=on_part
        )


class PairSession(Judgement):
    """One comparison and its parts. See `compare` for most arguments and for errors.

    Args:
      title: the title of the report; None for the checkpoint's name.
      bare: whether to leave out the candidate's own tables.
    """

    candidate: Any

    def __init__(
        self,
        reference: Given,
        candidate: Given,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        inputs: GivenInputs = None,
        precision: str | DTypeLike | Precision = "float32",
        seed: int = 0,
        title: str | None = None,
        bare: bool = False,
        progress: Progress = silent,
    ):
        self.progress = progress
        self.precision = resolve_precision(precision)
        if self.precision.name == MIXED:
            raise InputError(
                f"precision is {MIXED!r}, in which this package's model alone computes: give bfloat16, or float32"
            )
        self._path = None if checkpoint is None else _existing(checkpoint)
        declared = _declaration(reference, "reference")
        self.inputs = find_inputs(declared, inputs, seed)
        progress(f"loading {declared.name}")
        loaded = load_in_float64(declared, self._path)
        plain = self._implementation(dataclasses.replace(declared, sites=None), Blank(), loaded)
        progress(f"{declared.name}: finding its sites")
        with naming(reference, declared):
            self.found = discover(plain, declared.sites, self.inputs)
        declared = dataclasses.replace(declared, sites=self.found.table)
        # This one is observed at all sites. The candidate may show only some of them.
        self.whole = self._implementation(declared, self.found.outline, loaded, role="reference")
        output = require_repeatable(self.whole, self.inputs, self.found.output, progress=progress)
        require_floats({OUTPUT: output}, declared.name)
        if not output.any():
            raise UnjudgedError(
                f"{declared.name}: its {{place}} is zero everywhere, which tells nothing: give other inputs", OUTPUT
            )
        self.not_behaviour = self._not_by_row(declared, loaded, output)
        parameters = self.whole.parameters()
        self._digest = digest_of(parameters)
        if takes(declared.load, "dtype") or not is_torch(loaded):
            with self.precision.active():
                again = load(declared, self._path, self.precision.dtype)
            rounded = self._implementation(declared, self.found.outline, again).parameters()
            require_same_weights(declared.name, parameters, rounded, self.precision.dtype)
            del again, rounded
        del parameters
        self.explainer = PairExplainer(self.whole, self.inputs, list(self.found.outline.shapes(self.inputs)))
        attention = ""
        if getattr(declared, "attention", True):
            progress(f"{declared.name}: its ways of attention")
            attention = require_same_attention(declared.name, loaded, output, partial(self._output_of, declared))
        self.notes = self._notes(attention, note_constants(loaded))
        # Only now, because importing its file may change what the reference calls.
        declaration = _declaration(candidate, "candidate")
        if bare:
            declaration = dataclasses.replace(declaration, sites={}, parameters={})
        if takes(declaration.load, "reference"):
            declaration = dataclasses.replace(declaration, load=partial(declaration.load, reference=loaded))
        progress(f"loading {declaration.name}")
        with naming(candidate, declaration):
            self.candidate = self._candidate(declaration, loaded)
            claims = self._shown(declaration)
        # This one keeps only the sites that the candidate shows. All sites take as much memory as a backward pass.
        shared = {key: kept for key, target in self.found.table.items() if (kept := _only(target, claims))}
        self.reference = self._implementation(
            dataclasses.replace(declared, sites=shared), self.found.outline.only(claims), loaded, role="reference"
        )
        # One row, if that is allowed: the checks of behaviour run rows alone, operation by operation, and jax then uses
        # the same operations again.
        some = self.inputs if self.not_behaviour else take_rows(self.inputs, slice(1))
        with naming(candidate, declaration):
            try:
                once = require_repeatable(self.candidate, some, progress=progress)
            except InputError:
                if some is self.inputs:
                    raise
                # The caller did not give one row, and the candidate may need a whole batch.
                once = require_repeatable(self.candidate, self.inputs, progress=silent)
            require_floats({OUTPUT: once}, declaration.name)
        now = digest_of(self.whole.parameters()), self._output_of(declared, loaded)
        require_unchanged(declaration.name, (self._digest, output), now)
        require_same_parts(declaration.name, self.candidate.parts, self.whole.parts)
        self.title = self.origin.name if title is None else title
        self.candidate.find_single_uses(self.inputs)

    def _implementation(self, declaration: Candidate, outline: Outline, loaded: Any, role: str = "candidate") -> Any:
        """Returns the engine's view of the model that a loader returned."""
        made = implement(declaration, outline, self._path, loaded)
        made.role = role
        return made

    def _output_of(self, declaration: Candidate, loaded: Any, rows: slice = slice(None)) -> NDArray:
        """Returns the float64 output of a model that the reference's loader returned."""
        run = self._implementation(dataclasses.replace(declaration, sites={}), self.found.outline, loaded)
        inputs = self.inputs if rows == slice(None) else take_rows(self.inputs, rows)
        (output,) = run.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=passing)
        return np.asarray(output)

    def _not_by_row(self, declaration: Candidate, loaded: Any, output: NDArray) -> str:
        """Returns why a row may give another output alone than in its batch; "" if it must give the same."""
        if count_rows(self.inputs) < 2:
            return "in a batch: the inputs have one row"
        try:
            alone = self._output_of(declaration, loaded, slice(1))
        except InputError:
            return "in a batch: the reference cannot run on one row"
        same = error(alone, output[:1]).passes_semantic_gate
        return "" if same else "in a batch: a row of the reference's own output depends on the others"

    def _candidate(self, declaration: Candidate, reference: Any) -> Any:
        loaded = load_in_float64(declaration, self._path)
        if loaded is reference:
            raise CandidateError(f"{declaration.name}: load() returns the reference itself: make another model of it")
        outline = self.found.outline
        if declaration.parameters is None:
            bare = self._implementation(dataclasses.replace(declaration, sites={}), outline, loaded)
            table = match_parameters(bare.parameters(), self.whole.parameters())
            declaration = dataclasses.replace(declaration, parameters=table)
        return self._implementation(declaration, outline.only(self._shown(declaration)), loaded)

    def _shown(self, declaration: Candidate) -> frozenset[str]:
        """Returns the sites that a candidate may show: those of its table, or all if it has none."""
        every = self.found.outline.shapes(self.inputs)
        if declaration.sites is None:
            return frozenset(every)
        return claimed(declaration.sites, self.found.outline, every) | {OUTPUT}

    def _notes(self, *found: str) -> tuple[str, ...]:
        notes = ["the reference is the only truth: no oracle knows what it computes", *found, *self.whole.notes]
        if several := self.found.repeated:
            more = ", ..." if len(several) > 3 else ""
            notes.append(f"no sites, because they run more than once in a pass: {', '.join(several[:3])}{more}")
        return tuple(filter(None, notes))

    @cached_property
    def origin(self) -> Origin:
        """The checkpoint's name and the digest of its weights; without a checkpoint, of the reference's parameters."""
        if self._path is not None:
            return find_origin_of(self._path)
        return Origin(f"{self.reference.name}'s own weights", "", self._digest, None)

    @property
    def problem(self) -> Problem:
        """The problem: inputs, shared sites and gradients."""
        outline: Outline = self.reference.outline
        shapes = outline.shapes(self.inputs)
        everything = tuple(self.found.outline.shapes(self.inputs))
        floats = [name_input(name) for name, value in self.inputs.items() if is_float(value)]
        sites = [site for site in reversed(list(shapes)) if site not in self.reference.fixed]
        return Problem(
            self.inputs,
            shapes,
            streams=None,
            output=shapes[OUTPUT],
            gradients=(*sites, *reversed(list(outline.parameters())), *floats),
            passed=everything,
        )

    def forward(self, stops: Callable[[str], bool] = never) -> ParityReport:
        """Implements `Judgement.forward`."""
        return compare_forward(
            self.title,
            self.problem,
            self.reference,
            None,
            self.candidate,
            self.precision,
            explainer=self.explainer,
            stops=stops,
            on_divergence=self.on_divergence,
            on_trace=self.keep_output,
            progress=self.progress,
        )

    def backward(self) -> ParityReport:
        """Compares every gradient, see `compare_backward`."""
        return compare_backward(
            f"{self.title}, backward",
            self.problem,
            self.reference,
            self.candidate,
            self.precision,
            explainer=self.explainer,
            progress=self.progress,
        )

    def behaviour(self) -> tuple[Behaviour, ...]:
        """Runs the candidate in ways that must agree, see `check_behaviour`."""
        return check_behaviour(
            self.candidate, self.inputs, by_row=not self.not_behaviour, tapped=self.tapped, progress=self.progress
        )

    def given(self) -> dict[str, NDArray]:
        """Implements `Judgement.given`."""
        return dict(self.inputs)


def count_steps(*, backward: bool) -> int:
    """Returns how often `compare` reports progress for a right candidate whose rounding settles at once."""
    return 11 + (LOOKS[0] if backward else 0)


def _declaration(given: Given, side: str) -> Candidate:
    """Returns the declaration of a side after checking that it asks for nothing that only `verify` does."""
    found = find_declaration(given, side)
    if found.channels_first is not None:
        raise InputError(f"{found.name}: channels_first belongs to verify: move the axes in adapt=")
    return found


def _existing(checkpoint: Any) -> Path:
    """Returns a path after checking that it exists."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise InputError(f"checkpoint is a {type(checkpoint).__name__}: give a path that both sides load, or None")
    path = Path(checkpoint)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory: name the checkpoint that both sides load")
    return path


def _only(target: Any, sites: frozenset[str]) -> list[Any]:
    """Returns the targets in one line of a table that are among these sites."""
    several = target if isinstance(target, list) else [target]
    return [each for each in several if (each if isinstance(each, str) else each[0]) in sites]


@contextlib.contextmanager
def naming(given: Given, declared: Candidate) -> Iterator[None]:
    """Names the side, as the caller gave it, in the errors of its table. Both sides have a table."""
    side = given if isinstance(given, str) else declared.name
    try:
        yield
    except CandidateError as found:
        if not str(found).startswith(("sites:", "parameters:")):
            raise
        raise CandidateError(f"{side}: {found}") from found
