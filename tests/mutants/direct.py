"""Calls parity directly, because pytest around it would take longer than the check."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tests.helpers.remembered import digest, remembered_references
from tests.mutants.mutant import Parity
from tests.mutants.nested import fresh_compiler
from tests.mutants.outcome import Failure, Outcome
from vit_ref.errors import InputError
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.trace import Forward, recorder
from vit_ref.verify.report import headline
from vit_ref.verify.session import Session
from vit_ref.weights.checkpoint import Checkpoint


def judge(parity: Parity, *, compiled: bool = False) -> Outcome:
    """Checks this package's own model on one embedded case, as `-m parity` does.

    Args:
      parity: the case, and whether to go forward or backward.
      compiled: whether to compile the forward pass; else it runs operation by operation. Gradients are always compiled.
    """
    case = CASES[parity.case]
    source, pixels = case.checkpoint(), case.images()
    before, failed = _digests(source, pixels), {}
    way = fresh_compiler() if compiled or parity.backward else operation_by_operation()
    with remembered_references(), way:
        try:
            session = Session(case.config, source, pixels, OwnCandidate(case.config, source), title=case.name)
            # A wrong formula has failed, whatever its rounding.
            report = session.backward() if parity.backward else session.forward(stops=lambda site: True)
        except InputError as error:
            failed["input"] = Failure(type(error), str(error))
        else:
            if not report.passed:
                failed["report"] = Failure(AssertionError, headline(report))
    after = _digests(source, pixels)
    for name in before:
        if after[name] != before[name]:
            failed[name] = Failure(AssertionError, f"the candidate changed {name} in place")
    return Outcome(failed, passed=int(not failed))


def _digests(source: Checkpoint, pixels: NDArray) -> dict[str, str]:
    return {name: digest(array) for name, array in {"the images": pixels, **source.tensors}.items()}


@contextlib.contextmanager
def operation_by_operation() -> Iterator[None]:
    """Runs this package's model forward without a compiler, which takes most of a small model's time.

    jax's cache of single operations holds no code of the model, so it serves one mutant after another.
    """

    def uncompiled(self: OwnCandidate, forward: Forward, dtype: np.dtype) -> Any:
        record = recorder(forward)
        return SimpleNamespace(
            recorder=lambda parameters, *given: record(jax.tree.map(jnp.asarray, parameters), *given)
        )

    with mock.patch.object(OwnCandidate, "_compiled_of", uncompiled):
        yield
