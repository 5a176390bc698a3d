"""The backward comparison: a candidate's gradients against the reference's, under the same two gates as forward.

It observes the gradients with respect to every parameter, every site's activation and the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise

from numpy.typing import NDArray

from vit_ref.verify.compare.forward import require_finite, require_finite_truth
from vit_ref.verify.compare.memory import returning_memory
from vit_ref.verify.compare.objectives import LOOKS, SEMANTIC_OBJECTIVES, Gradients, Objective, objectives_for
from vit_ref.verify.compare.pooling import Pooled
from vit_ref.verify.compare.protocols import Explainer, Kept, Nothing, Observable, Reference
from vit_ref.verify.compare.trace import Progress, require_float64, silent, widened
from vit_ref.verify.gates import Error, Errors, Truth, errors_of
from vit_ref.verify.precision import FLOAT32, FLOAT64, Precision
from vit_ref.verify.problem import Problem
from vit_ref.verify.results import Explanation, ParityReport


def compare_backward(
    title: str,
    problem: Problem,
    reference: Reference,
    candidate: Observable,
    precision: Precision,
    *,
    explainer: Explainer | None = None,
    fuse: Callable[[Reference], Reference] | None = None,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Measures every gradient of the candidate against the reference's in float64.

    Args:
      title: name of the checkpoint or case, for the report.
      problem: the problem to compare.
      reference: the implementation that decides.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      explainer: finds the cause of a divergence; None does not look for one.
      fuse: returns the same reference with fused attention, for a candidate that may have it. The rounding of fused
        attention is then allowed too. None for any other candidate.
      kept: errors of this reference from earlier runs; None measures all of them.
      progress: gets a description of each next step.

    Returns:
      One result for each gradient of the problem. Its float64 error is the worst of `SEMANTIC_OBJECTIVES`. Its rounding
      is the root mean square over several objectives, because the error of one pull-back depends on luck (see
      `objectives.DARKER`). `pooling.Pooled.settled` decides how many.

    Raises:
      UnsupportedByReferenceError: the reference has no backward pass.
      UndifferentiableError: the candidate has no backward pass.
      ReferenceOverflowError: the reference is not finite in float64; or the formulas agree, but it is not finite in
        the tested precision.
    """
    progress = returning_memory(progress, problem)
    pooled = Pooled(problem.gradients, precision.dtype, reference.foreign)
    comparison = Comparison(problem, reference, candidate, precision, explainer, kept=kept)
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
    """A reference and a candidate that are ready to be differentiated.

    Args:
      problem: the problem to compare.
      reference: the implementation that decides.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      explainer: see `compare_backward`.
      formula: whether the candidate's formulas are compared in float64.
      kept: see `compare_backward`.

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
        kept: Kept | None = None,
    ):
        self._inputs, self._precision, self._explainer = problem.inputs, precision, explainer
        self._reference, self._candidate = reference.name, candidate.name
        self._kept = kept or Nothing()
        self._truth = reference.gradients(self._inputs, FLOAT64)
        self._exact = candidate.gradients(self._inputs, FLOAT64) if formula else None
        # The right gradients for the parameters as they are stored. The semantic gate does not use them.
        self._stored_truth, unstored = self._truth, reference
        if precision.stored is not None:
            reference, candidate = reference.storing(precision), candidate.storing(precision)
            self._stored_truth = reference.gradients(self._inputs, FLOAT64)
        self._stored_reference = reference
        self._own = self._prepared("gradients", reference)
        # Compiled only for a candidate that may be wrong.
        self._float32 = cache(partial(unstored.gradients, self._inputs, FLOAT32))
        self._rounding = candidate.gradients(self._inputs, precision)

    def measure(self, objective: Objective, pooled: Pooled) -> None:
        """Adds the errors of one objective's gradients. The first `SEMANTIC_OBJECTIVES` include those in float64.

        The gradients of a real model take a gigabyte, and their errors take almost nothing. So only two sets of
        gradients are in memory at a time, and three of a candidate that may be wrong.

        Raises:
          InputError: no formula was wrong so far, but the reference is not finite in the tested precision.
        """
        truth, truths = self._in_float64(self._truth, objective)
        number, own = len(pooled.roundings), dict[str, Error]()
        if self._exact and len(pooled.exacts) < SEMANTIC_OBJECTIVES:
            exact = widened(self._exact(objective).named(), self._candidate)
            pooled.exacts.append(errors_of(exact, truths))
            if pooled.suspect:
                if self._precision == FLOAT32:
                    own = self._errors_of("gradients", self._own, objective, number, truths)
                    pooled.excuse(own)
                else:
                    pooled.excuse(errors_of(self._float32()(objective).named(), truths))
            failed = [{name for name, e in found.items() if not e.passes_semantic_gate} for found in pooled.exacts]
            first = next((name for name in pooled.names if any(name in names for names in failed)), "")
            # The first divergence of all objectives is explained. It may be right in some of them.
            known = {cause.site for cause in pooled.explanation.causes}
            if self._explainer and first in failed[-1] and first not in known:
                pooled.explanation = self._explainer.explain_gradient(first, exact[first], truth[first])
            del exact
        if self._stored_truth is not self._truth:
            truth, truths = self._in_float64(self._stored_truth, objective)
        reference_errors = own or self._errors_of("gradients", self._own, objective, number, truths)
        if not pooled.wrong:  # otherwise the verdict is known
            # The results of a compiled pass come in another order than the pass.
            require_finite(
                {name: reference_errors[name] for name in pooled.names}, self._reference, self._precision.name
            )
        pooled.reference_errors.append(reference_errors)
        pooled.roundings.append(errors_of(self._rounding(objective).named(), truths))

    def measure_fused(
        self, fuse: Callable[[Reference], Reference], objectives: Sequence[Objective], pooled: Pooled
    ) -> None:
        """Adds the reference's errors with fused attention, for the objectives that were measured.

        This comes last, and only for a candidate that fails, because the reference has to be compiled again.
        """
        fused = self._prepared("fused gradients", fuse(self._stored_reference))
        for k, objective in enumerate(objectives):
            _, truths = self._in_float64(self._stored_truth, objective)
            pooled.fused.append(self._errors_of("fused gradients", fused, objective, k, truths))

    def _prepared(self, what: str, reference: Reference) -> Callable[[Objective], Gradients]:
        """Returns the reference's gradients in the tested precision. If their errors are kept, they may never run."""
        prepare = cache(partial(reference.gradients, self._inputs, self._precision))
        if self._kept.find(f"{what} 0") is None:
            prepare()  # it is compiled while others run
        return lambda objective: prepare()(objective)

    def _errors_of(
        self,
        what: str,
        gradients: Callable[[Objective], Gradients],
        objective: Objective,
        k: int,
        truths: Mapping[str, Truth],
    ) -> Errors:
        """Returns the errors of the reference's gradients in the tested precision, for objective number `k`."""
        errors = self._kept.find(f"{what} {k}")
        if errors is None:
            errors = errors_of(gradients(objective).named(), truths, carriers=True)
            self._kept.keep(f"{what} {k}", errors)
        return errors

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
    """Returns the report of the measured gradients.

    Args:
      title: name of the checkpoint or case.
      pooled: the errors.
      reference: the implementation that decides.
      precision: the tested precision.
      claims: see `Observable.claims`.
    """
    # What a later objective excuses needs no cause.
    explanation = pooled.explanation if pooled.wrong else Explanation()
    # A candidate that does not claim every site may have unmapped parameters, and values seen only after their use.
    return ParityReport(
        title,
        reference.name,
        precision.name,
        pooled.results(),
        unobserved=pooled.missing if claims is None else (),
        unmapped=() if claims is None else pooled.missing,
        what="gradients",
        causes=explanation.causes,
        place=explanation.place,
        order=tuple(pooled.names),
        objectives=len(pooled.roundings),
    )


def truths_of(gradients: Mapping[str, NDArray]) -> dict[str, Truth]:
    """Returns the right gradients, each with the scale of its errors: its own or its layer's.

    A bias is measured at its layer's scale for two reasons:

    - The key's bias has a gradient of zero, because it adds the same to all scores of a query, and softmax ignores
      that. Every implementation computes only rounding there. The terms that cancel have the scale of the kernel's.
    - The terms of a norm's bias may cancel if a model has one output. They are as large as those of its scale.

    Args:
      gradients: the gradients by name, in float64.
    """
    truths = {name: Truth(value) for name, value in gradients.items()}
    for name, value in gradients.items():
        mates = [truths.get(name.removesuffix("bias") + leaf) for leaf in ("kernel", "scale", "weight")]
        if name.endswith(".bias"):
            truths[name] = Truth(value, max([truths[name].rms, *(mate.rms for mate in mates if mate)]))
    return truths
