"""The backward comparison: a candidate's gradients against the reference's, under the same two gates as forward.

Observed is the gradient with respect to every parameter, every site's activation and the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from numpy.typing import NDArray

from vit_ref.verify.compare.forward import require_finite, require_finite_truth
from vit_ref.verify.compare.objectives import LOOKS, SEMANTIC_OBJECTIVES, Gradients, Objective, objectives_for
from vit_ref.verify.compare.pooling import Pooled
from vit_ref.verify.compare.protocols import Explainer, Observable, Reference
from vit_ref.verify.compare.trace import Progress, require_float64, silent, widened
from vit_ref.verify.gates import Truth, errors_of
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.problem import Problem
from vit_ref.verify.results import ParityReport


def compare_backward(
    title: str,
    problem: Problem,
    reference: Reference,
    candidate: Observable,
    precision: Precision,
    *,
    explainer: Explainer | None = None,
    fuse: Callable[[Reference], Reference] | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Measures every gradient of the candidate against the reference's in float64.

    Args:
      title: which checkpoint or case, for the report.
      problem: what is compared.
      reference: what decides.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      explainer: finds the cause of a divergence; None not to look for one.
      fuse: gives the same reference with fused attention, for a candidate that may have it. Its rounding is then
        allowed, too. None for any other candidate.
      progress: told what is being done next.

    Returns:
      One result a gradient of the problem. In float64 each holds the worst of `SEMANTIC_OBJECTIVES`. Rounding is pooled
      over as many objectives as it takes, see `pooling.Pooled.settled`, as a root mean square: a single pull-back is
      lucky or unlucky (see `objectives.DARKER`).

    Raises:
      UnsupportedByReferenceError: the reference has no backward pass.
      UndifferentiableError: the candidate has none.
      ReferenceOverflowError: the reference is not finite in float64; or the formulas agree, and it is not finite in
        the tested precision.
    """
    pooled = Pooled(problem.gradients, precision.dtype, reference.foreign)
    comparison = Comparison(problem, reference, candidate, precision, explainer)
    objectives = objectives_for(problem.output)
    for start, stop in pairwise((0, *LOOKS)):
        for k in range(start, stop):
            progress(f"gradients, objective {k + 1} of at most {len(objectives)}")
            comparison.measure(objectives[k], pooled)
        if pooled.settled:
            break
    if fuse and not pooled.passed and not pooled.wrong:
        progress(f"gradients of {reference.name} with fused attention")
        comparison.measure_fused(fuse, objectives[:stop], pooled)
    return gradients_report(title, pooled, reference, precision, candidate.claims)


class Comparison:
    """Reference and candidate, made ready to be differentiated.

    Args:
      problem: what is compared.
      reference: what decides.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      explainer: see `compare_backward`.
      formula: whether the candidate is asked for float64 at all.

    Raises:
      UnsupportedByReferenceError: the reference has no backward pass.
    """

    def __init__(
        self,
        problem: Problem,
        reference: Reference,
        candidate: Observable,
        precision: Precision,
        explainer: Explainer | None,
        *,
        formula: bool = True,
    ):
        self._inputs, self._precision, self._explainer = problem.inputs, precision, explainer
        self._reference, self._candidate = reference.name, candidate.name
        self._truth = reference.gradients(self._inputs, FLOAT64)
        self._exact = candidate.gradients(self._inputs, FLOAT64) if formula else None
        # Of the parameters as they are stored, which the semantic gate has nothing to do with.
        self._stored_truth = self._truth
        if precision.stored is not None:
            reference, candidate = reference.storing(precision), candidate.storing(precision)
            self._stored_truth = reference.gradients(self._inputs, FLOAT64)
        self._stored_reference = reference
        self._own = reference.gradients(self._inputs, precision)
        self._rounding = candidate.gradients(self._inputs, precision)

    def measure(self, objective: Objective, pooled: Pooled) -> None:
        """Adds the errors of one objective's gradients: in float64 too, until `SEMANTIC_OBJECTIVES` have been.

        The gradients of a real model take a gigabyte, their errors nothing: two of them are held at a time.

        Raises:
          InputError: no formula was wrong so far, and the reference is not finite in the tested precision.
        """
        truth, truths = self._in_float64(self._truth, objective)
        if self._exact and len(pooled.exacts) < SEMANTIC_OBJECTIVES:
            exact = widened(self._exact(objective).named(), self._candidate)
            errors = errors_of(exact, truths)
            pooled.exacts.append(errors)
            failed = [{name for name, e in found.items() if not e.passes_semantic_gate} for found in pooled.exacts]
            first = next((name for name in pooled.names if any(name in names for names in failed)), "")
            # What is explained is the first divergence of all objectives, which need not be wrong in each.
            known = {cause.site for cause in pooled.explanation.causes}
            if self._explainer and first in failed[-1] and first not in known:
                pooled.explanation = self._explainer.explain_gradient(first, exact[first], truth[first])
            del exact
        if self._stored_truth is not self._truth:
            truth, truths = self._in_float64(self._stored_truth, objective)
        reference_errors = errors_of(self._own(objective).named(), truths, carriers=True)
        if not pooled.wrong:  # else the verdict stands
            # In the order of the pass, which a compiled one's results have not.
            require_finite(
                {name: reference_errors[name] for name in pooled.names}, self._reference, self._precision.name
            )
        pooled.reference_errors.append(reference_errors)
        pooled.roundings.append(errors_of(self._rounding(objective).named(), truths))

    def measure_fused(
        self, fuse: Callable[[Reference], Reference], objectives: Sequence[Objective], pooled: Pooled
    ) -> None:
        """Adds the reference's errors with fused attention, of the objectives that were measured.

        This is done last, and only for a candidate that fails: the reference compiles once more for it.
        """
        fused = fuse(self._stored_reference).gradients(self._inputs, self._precision)
        for objective in objectives:
            _, truths = self._in_float64(self._stored_truth, objective)
            pooled.fused.append(errors_of(fused(objective).named(), truths, carriers=True))

    def _in_float64(
        self, gradients: Callable[[Objective], Gradients], objective: Objective
    ) -> tuple[dict[str, NDArray], dict[str, Truth]]:
        found = gradients(objective).named()
        require_float64(found, self._reference)
        truths = truths_of(found)
        require_finite_truth(truths, self._reference)
        return found, truths


def gradients_report(
    title: str, pooled: Pooled, reference: Reference, precision: Precision, claims: frozenset[str] | None
) -> ParityReport:
    """The report of what was measured of a candidate that claims these sites."""
    # A candidate that does not claim every site may have unmapped parameters, and values seen only after their use.
    return ParityReport(
        title,
        reference.name,
        precision.name,
        pooled.results(),
        unobserved=pooled.missing if claims is None else (),
        unmapped=() if claims is None else pooled.missing,
        what="gradients",
        causes=pooled.explanation.causes,
        place=pooled.explanation.place,
        order=tuple(pooled.names),
        objectives=len(pooled.roundings),
    )


def truths_of(gradients: Mapping[str, NDArray]) -> dict[str, Truth]:
    """Gradients in float64, each with the scale that errors are relative to: its own, or its layer's.

    The key's bias has no gradient at all: it adds the same to all scores of a query, which softmax ignores. What any
    implementation computes there is rounding, at the scale of the terms that cancel, which is the kernel's. The terms
    of a norm's bias may cancel too, where a model has one output: they are as large as those of its scale.
    """
    truths = {name: Truth(value) for name, value in gradients.items()}
    for name, value in gradients.items():
        mates = [truths.get(name.removesuffix("bias") + leaf) for leaf in ("kernel", "scale", "weight")]
        if name.endswith(".bias"):
            truths[name] = Truth(value, max([truths[name].rms, *(mate.rms for mate in mates if mate)]))
    return truths
