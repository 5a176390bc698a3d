"""What a candidate has to do besides computing the right values: give the same each time, for each row alone,
compiled or not, with a tap or without."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError
from vit_ref.verify.compare.inputs import Inputs, copy_inputs, is_same, take_rows
from vit_ref.verify.compare.protocols import Runnable
from vit_ref.verify.compare.trace import Progress, passing, silent
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.results import Behaviour


def check_behaviour(
    candidate: Runnable, inputs: Inputs, *, by_row: bool = True, progress: Progress = silent
) -> tuple[Behaviour, ...]:
    """Runs a candidate in float64 in ways that must all agree to within the semantic gate.

    Args:
      candidate: the candidate.
      inputs: see `Problem.inputs`; two rows at least for "batch" to mean anything.
      by_row: whether a row of the batch has to come out alone as it does in the batch; False leaves "batch" out.
      progress: told what is being done next.
    """
    progress(f"{candidate.name}: the same each time, alone, compiled")
    first, last = ([take_rows(inputs, rows)] if by_row else [] for rows in (slice(1), slice(-1, None)))
    # Copies: what a candidate writes into its inputs would show in the next run, too.
    given = [copy_inputs(each) for each in (inputs, inputs, *first, *last)]
    jit = True
    try:
        try:
            together, again, *alone = candidate.outputs(given, FLOAT64)
        except InputError as error:
            # Whether a tap is what it lacks: else this raises the same.
            candidate.outputs(given, FLOAT64, tap=passing)
            return (Behaviour("untapped", None, f"without a tap {error}"),)
        if candidate.compiles:
            # The first alone, then all, then the last: what an eager pass keeps is not what the next one should give.
            eager = candidate.outputs([*first, inputs, *last], FLOAT64, jit=False)
            own = _behaviour("jit", [*alone[:1], together, *alone[1:]], eager, _JIT)
        else:
            own = Behaviour("inputs", None, "" if is_same(given[0], inputs) else _INPUTS)
    except jax.errors.JAXTypeError as error:
        reason = f"jax cannot trace it ({type(error).__name__}), so nothing can compile or differentiate it"
        own, jit = Behaviour("jit", None, reason), False
        together, again, *alone = candidate.outputs(given, FLOAT64, jit=False)
    repeat = _behaviour("repeat", [together], [again], _REPEAT)
    batch = [_behaviour("batch", [together[:1], together[-1:]], alone, _BATCH)] if by_row else []
    if not repeat.passed:
        return repeat, *batch, own
    # A tap may keep it from a path of its own, as fused attention is, and that is the one that users run.
    tapped = candidate.outputs([copy_inputs(inputs)], FLOAT64, jit=jit, tap=passing)
    return repeat, *batch, own, _behaviour("untapped", tapped, [together], _UNTAPPED)


def require_repeatable(candidate: Runnable, inputs: Inputs, *, progress: Progress = silent) -> NDArray:
    """Runs a candidate twice on the same inputs before anything else is asked of it.

    A candidate whose dropout is live has no value that could be compared, and every other check would fail first. Nor
    has a site one value that is shown with several in one pass.

    Args:
      candidate: the candidate.
      inputs: see `Problem.inputs`.
      progress: told what is being done next.

    Returns:
      The output in float64.

    Raises:
      InputError: the two outputs differ, a site has several values in one pass, or the candidate cannot be run.
    """
    progress(f"{candidate.name}: twice the same")
    shown: dict[str, list[bytes]] = {}

    def keep(site: str, value: Any) -> Any:
        if not isinstance(value, jax.core.Tracer):
            array = np.ascontiguousarray(value.detach().cpu() if hasattr(value, "detach") else value)
            shown.setdefault(site, []).append(hashlib.blake2b(array.tobytes()).digest())
        return value

    try:
        (once,) = candidate.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=keep)
        (again,) = candidate.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=passing)
    except jax.errors.JAXTypeError as error:
        raise CandidateError.raised(candidate.name, "the forward pass", error) from error
    for site, digests in shown.items():
        if len(set(digests)) > 1:
            path = candidate.path_of(site)
            raise InputError(
                f"{candidate.name}: {path!r} runs {len(digests)} times in one forward pass and shows another value of"
                f" {site} each time, as where the outputs of an image and its mirror image are averaged: give"
                " call=lambda model, images: ... that runs the model once"
            )
    repeat = _behaviour("repeat", [once], [again], _REPEAT)
    if not repeat.passed:
        raise InputError(f"{candidate.name}: {repeat.reason} (relative RMS {repeat.error:.1e})")
    return once


# Sums of some thousand products that were rounded to float32.
_FLOAT32 = 1e-5
_BATCH = "an input alone comes out otherwise than in its batch"
_REPEAT = "two runs on the same inputs differ: is dropout live? load it in evaluation mode"
_JIT = "compiled it computes something else than operation by operation"
_UNTAPPED = "its output is another without a tap, so what was compared is not what runs"
_INPUTS = "it writes into the inputs that it is given: it has to copy them"


def _behaviour(name: str, expected: Sequence[NDArray], found: Sequence[NDArray], reason: str) -> Behaviour:
    # What is NaN both times, or has no elements, is the same each time; that it is wrong is said elsewhere.
    apart = max(
        0.0 if np.array_equal(theirs, right, equal_nan=True) else error(theirs, right).rms
        for right, theirs in zip(expected, found, strict=True)
    )
    if apart <= SEMANTIC_RMS:
        reason = ""
    elif apart < _FLOAT32:
        reason += f" (by {apart:.0e}, which may be something in it that is float32 and not float64)"
    return Behaviour(name, apart, reason)
