"""Checks of a candidate's behaviour: equal outputs in each run, for each row alone, compiled or not, tapped or not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
    candidate: Runnable,
    inputs: Inputs,
    *,
    by_row: bool = True,
    tapped: NDArray | None = None,
    progress: Progress = silent,
) -> tuple[Behaviour, ...]:
    """Runs a candidate in float64 in several ways, which must agree to within the semantic gate.

    Args:
      candidate: the candidate.
      inputs: see `Problem.inputs`. The check "batch" needs at least two rows.
      by_row: whether a row must give the same output alone as in the batch. False leaves out the check "batch".
      tapped: its output on these inputs in float64 with a tap, if the forward comparison has run it so.
      progress: gets a description of each next step.
    """
    progress(f"{candidate.name}: the same each time, alone, compiled")
    first, last = ([take_rows(inputs, rows)] if by_row else [] for rows in (slice(1), slice(-1, None)))
    # These are copies, because a candidate that writes into its inputs would change the next run too.
    given = [copy_inputs(each) for each in (inputs, inputs, *first, *last)]
    try:
        try:
            together, again, *alone = candidate.outputs(given, FLOAT64)
        except InputError as error:
            # If the candidate only lacks a tap, this succeeds. Otherwise it raises the same error.
            candidate.outputs(given, FLOAT64, tap=passing)
            return (Behaviour("untapped", None, f"without a tap {error}"),)
        if candidate.compiles:
            # The check "batch" compares the rows with the batch. Operations on a batch would be compiled once more. A
            # pass that returns what the previous pass left over gives a wrong output for the last row.
            eager = candidate.outputs([*first, *last] or [inputs], FLOAT64, jit=False)
            own = _behaviour("jit", alone or [together], eager, _JIT)
        else:
            own = Behaviour("inputs", None, "" if is_same(given[0], inputs) else _INPUTS)
    except jax.errors.JAXTypeError as error:
        reason = f"jax cannot trace it ({type(error).__name__}), so nothing can compile or differentiate it"
        own = Behaviour("jit", None, reason)
        together, again, *alone = candidate.outputs(given, FLOAT64, jit=False)
    repeat = _behaviour("repeat", [together], [again], _REPEAT)
    batch = [_behaviour("batch", [together[:1], together[-1:]], alone, _BATCH)] if by_row else []
    if not repeat.passed:
        return repeat, *batch, own
    # A tap may keep the candidate from another path, such as fused attention. Users run that path.
    if tapped is None:
        # This is how the forward comparison runs it, so it is compiled already.
        tapped = candidate.trace(copy_inputs(inputs), FLOAT64)[candidate.last]
    return repeat, *batch, own, _behaviour("untapped", [tapped], [together], _UNTAPPED)


def require_repeatable(
    candidate: Runnable,
    inputs: Inputs,
    once: NDArray | None = None,
    *,
    look: Callable[[str, NDArray], None] | None = None,
    progress: Progress = silent,
) -> NDArray:
    """Checks that two runs of a candidate on the same inputs give the same output, and one value at each site.

    It comes before all other checks. They would fail for a candidate with live dropout, and hide that reason. A site
    with several values in one pass cannot be compared either.

    Args:
      candidate: the candidate.
      inputs: see `Problem.inputs`.
      once: its output in float64 on these inputs, if the caller has run it already, operation by operation.
      look: gets each site and its value in the second run.
      progress: gets a description of each next step.

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
            if look is not None:
                look(site, array)
            shown.setdefault(site, []).append(hashlib.blake2b(array.tobytes()).digest())
        return value

    try:
        if once is None:
            (once,) = candidate.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=passing)
        (again,) = candidate.outputs([copy_inputs(inputs)], FLOAT64, jit=False, tap=keep)
    except jax.errors.JAXTypeError as error:
        raise CandidateError.raised(candidate.name, "the forward pass", error) from error
    for site, digests in shown.items():
        if len(set(digests)) > 1:
            path = candidate.path_of(site)
            raise InputError(
                f"{candidate.name}: {path!r} runs {len(digests)} times in one forward pass and shows another value of"
                f" {site} each time, for example if it averages the outputs of an image and its mirror image: give"
                " call=lambda model, images: ... that runs the model once"
            )
    repeat = _behaviour("repeat", [once], [again], _REPEAT)
    if not repeat.passed:
        raise InputError(f"{candidate.name}: {repeat.reason} (relative RMS {repeat.error:.1e})")
    return once


# The error of a sum of some thousand products that were rounded to float32.
_FLOAT32 = 1e-5
_BATCH = "an input alone gives another output than in its batch"
_REPEAT = "two runs on the same inputs differ: is dropout live? load it in evaluation mode"
_JIT = "its output is another if it is compiled than if it runs operation by operation"
_UNTAPPED = "its output is another without a tap, so the code that was checked is not the code that users run"
_INPUTS = "it writes into its inputs: make it copy them first"


def _behaviour(name: str, expected: Sequence[NDArray], found: Sequence[NDArray], reason: str) -> Behaviour:
    # Two values that are both NaN, or both empty, count as equal here. Another check reports that they are wrong.
    apart = max(
        0.0 if np.array_equal(theirs, right, equal_nan=True) else error(theirs, right).rms
        for right, theirs in zip(expected, found, strict=True)
    )
    if apart <= SEMANTIC_RMS:
        reason = ""
    elif apart < _FLOAT32:
        reason += f" (by {apart:.0e}: a part of it may be float32 and not float64)"
    return Behaviour(name, apart, reason)
