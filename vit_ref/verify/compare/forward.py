"""The forward comparison: a candidate against the reference and the oracle, at every site."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping

from vit_ref.errors import OraclesDifferError, ReferenceOverflowError, UnjudgedError
from vit_ref.verify.compare.first_look import OnDivergence, describe_divergence, ignore_divergence
from vit_ref.verify.compare.memory import returning_memory
from vit_ref.verify.compare.nearby import Rounding, measure_nearby
from vit_ref.verify.compare.protocols import Explainer, Kept, Nothing, Observable, Reference
from vit_ref.verify.compare.trace import Progress, Trace, beside, require_float64, silent, widened
from vit_ref.verify.gates import (
    CLEARLY_WRONG,
    SEMANTIC_RMS,
    Error,
    Truth,
    against,
    errors_of,
    float64_noise,
    wrong_sites,
)
from vit_ref.verify.precision import FLOAT32, FLOAT64, Precision
from vit_ref.verify.problem import Problem, hidden_before
from vit_ref.verify.results import Explanation, ParityReport, SiteResult


def require_finite(reference_errors: Mapping[str, Error], name: str, precision: str) -> None:
    """Checks that the reference is finite at every site.

    Args:
      reference_errors: the reference's errors by site, in order.
      name: the reference's name.
      precision: the name of the tested precision.

    Raises:
      ReferenceOverflowError: an error is not finite.
    """
    beyond = [site for site, error in reference_errors.items() if not math.isfinite(error.rms)]
    if beyond:
        places = f"{len(beyond)} of {len(reference_errors)} places"
        raise ReferenceOverflowError(
            f"{name} itself is not finite in {precision} at {places}, first {{place}}: judge another precision",
            beyond[0],
        )


def require_finite_truth(truths: Mapping[str, Truth], name: str) -> None:
    """Raises `ReferenceOverflowError` if the reference is not finite in float64: nothing can be compared then."""
    beyond = [what for what, truth in truths.items() if not truth.finite]
    if beyond:
        raise ReferenceOverflowError(
            f"{name} itself is not finite in float64 at {len(beyond)} of {len(truths)} places, first {{place}}: give"
            " inputs for which it is, or compare at other places",
            beyond[0],
        )


def require_observed(trace: Container[str], names: Iterable[str], reference: str, precision: str) -> None:
    """Raises `UnjudgedError` if the reference does not show a site in a precision, for example behind a branch."""
    lost = [site for site in names if site not in trace]
    if lost:
        raise UnjudgedError(
            f"{reference} shows no {{place}} in {precision}, so nothing can be compared there: let its pass be the same"
            " in every dtype, or leave that site out",
            lost[0],
        )


def require_agreement(oracles: Mapping[str, Error], reference: str, oracle: str) -> None:
    """Checks that reference and oracle agree to within the semantic gate.

    Args:
      oracles: the oracle's errors relative to the reference, by site, in order.
      reference: the reference's name.
      oracle: the oracle's name.

    Raises:
      OraclesDifferError: they differ at a site.
    """
    beyond = [site for site, error in oracles.items() if not error.passes_semantic_gate]
    if beyond:
        places = f"{len(beyond)} of {len(oracles)} sites"
        raise OraclesDifferError(
            f"{reference} and {oracle} differ in float64 at {places}, first {{place}} by"
            f" {against(oracles[beyond[0]].rms, SEMANTIC_RMS)}: one of the two is wrong, and neither can judge",
            beyond[0],
        )


def isolated(errors: Mapping[str, Error], fixed: frozenset[str]) -> dict[str, Error]:
    """Returns the errors of those parts that received only the reference's values.

    If a wrong value cannot be replaced, it enters the next part. Nothing is then known of that part alone.

    Args:
      errors: errors of all sites, in order.
      fixed: sites whose values cannot be replaced.
    """
    alone, inherited = dict[str, Error](), False
    for site, error in errors.items():
        if not inherited:
            alone[site] = error
        inherited = site in fixed and not error.passes_semantic_gate
    return alone


def never(site: str) -> bool:
    """Returns False: no wrong formula ends the comparison before rounding is measured."""
    return False


def itself(reference: Reference) -> Reference:
    """Returns the reference."""
    return reference


def compare_forward(
    title: str,
    problem: Problem,
    reference: Reference,
    oracle: Reference | None,
    candidate: Observable,
    precision: Precision,
    *,
    explainer: Explainer | None = None,
    kept: Kept | None = None,
    stops: Callable[[str], bool] = never,
    on_divergence: OnDivergence = ignore_divergence,
    on_trace: Callable[[Trace], None] | None = None,
    runs_nearby: Callable[[Reference], Reference] | None = itself,
    progress: Progress = silent,
) -> ParityReport:
    """Observes reference, oracle and candidate on the same inputs, and measures every site.

    Args:
      title: name of the checkpoint or case, for the report.
      problem: the problem to compare. Reference and oracle show all of its sites.
      reference: the implementation that decides.
      oracle: the oracle, which must agree with the reference; None if the reference is the only truth.
      candidate: the implementation under test.
      precision: the precision whose rounding is measured.
      explainer: finds the cause of a divergence; None does not look for one.
      kept: errors of this reference and this oracle from earlier runs; None measures all of them.
      stops: gets each site whose formula is wrong. If it returns True for one, rounding is not measured.
      on_divergence: gets a line about the first wrong formula before its cause is looked for.
      on_trace: gets the candidate's trace in float64.
      runs_nearby: returns the reference that runs on nearby inputs, if bad luck may explain an error beyond its gate;
        None never measures there.
      progress: gets a description of each next step.

    Returns:
      The report, with a result for each site that the candidate shows.

    Raises:
      TruncatedError: reference or oracle did not compute in float64, or the candidate did nowhere.
      OraclesDifferError: reference and oracle do not agree.
      ReferenceOverflowError: the reference is not finite in float64; or the formulas agree, but it is not finite in
        that precision.
    """
    progress = returning_memory(progress, problem)
    inputs, names, kept = problem.inputs, problem.names, kept or Nothing()
    agreement = kept.find("oracle") if oracle else {}
    # NumPy multiplies while the reference is traced and compiled.
    independent = beside(oracle.trace, inputs, FLOAT64) if oracle and agreement is None else None
    progress(f"{reference.name} in float64")
    truth = reference.trace(inputs, FLOAT64)
    require_float64(truth, reference.name)
    require_observed(truth, names, reference.name, FLOAT64.name)

    # A trace of a real model takes a gigabyte. So only this one is kept; of the others only the errors are.
    truths = {site: Truth(truth[site]) for site in names}
    require_finite_truth(truths, reference.name)
    if oracle and agreement is not None and not getattr(reference, "recalled", False):
        # The oracle agreed with an earlier trace, and this one is new.
        agreement, independent = None, beside(oracle.trace, inputs, FLOAT64)

    def each_alone(shown: set[str], precision: Precision) -> dict[str, Error]:
        progress("each block alone")
        if problem.streams is None:
            fixed = candidate.fixed | misshapen
            everywhere = {site: truth[site] for site in shown - fixed}
            return isolated(errors_of(candidate.trace(inputs, precision, replace=everywhere), truths), fixed)
        before = {site: problem.streams[site] for site in shown}
        fed = {stream: truth[stream] for stream in before.values() if stream in shown - candidate.fixed - misshapen}
        errors = errors_of(candidate.trace(inputs, precision, replace=fed), truths)
        return {
            site: errors[site] for site, stream in before.items() if site in errors and (not stream or stream in fed)
        }

    oracles = agreement or {}
    if oracle:
        progress(f"{oracle.name} in float64")
        if independent:
            oracle_trace = independent.result()
            require_float64(oracle_trace, oracle.name)
            oracles = errors_of(oracle_trace, truths)
            del oracle_trace
        require_agreement(oracles, reference.name, oracle.name)
        if independent:
            kept.keep("oracle", oracles)
    progress(f"{candidate.name} in float64")
    exact_trace = widened(candidate.trace(inputs, FLOAT64), candidate.name)
    if on_trace is not None:
        on_trace(exact_trace)
    exact = errors_of(exact_trace, truths)
    suspect = next(iter(wrong_sites(exact, names)), None)
    if suspect and exact[suspect].rms <= CLEARLY_WRONG:
        progress(f"{reference.name}: how much float64 may round")
        own = errors_of(reference.trace(inputs, FLOAT32), truths)
        noise = {site: float64_noise(error.rms) for site, error in own.items()}
        exact = {site: error._replace(noise=noise.get(site, 0.0)) for site, error in exact.items()}
    # The reference's values cannot replace these.
    misshapen = {site for site in exact if exact_trace[site].shape != truth[site].shape}
    found, alone = Explanation(), dict[str, Error]()
    wrong = wrong_sites(exact, names)
    first = next(iter(wrong), None)
    if first:
        on_divergence(describe_divergence(candidate.name, first, exact[first]))
    if first and explainer:
        progress("looking for the cause")
        found = explainer.explain_formula(first, exact_trace, truth)
    del exact_trace
    if first:
        alone = each_alone(set(exact), FLOAT64)
    # These stand for what is not measured if a wrong formula ends the comparison here.
    unmeasured = dict.fromkeys(exact, Error(math.nan, math.nan))
    rounding, gates = Rounding(unmeasured, unmeasured, precision, foreign=False), dict.fromkeys(exact, math.nan)
    coarse = None
    if not any(map(stops, wrong)):
        progress(f"{reference.name} in {precision.name}")
        if precision.stored is not None:
            # Rounding the parameters is no error of the candidate. So from here on the truth uses rounded parameters
            # too.
            reference, candidate = reference.storing(precision), candidate.storing(precision)
            truth = reference.trace(inputs, FLOAT64)
            require_float64(truth, reference.name)
            truths = {site: Truth(truth[site]) for site in names}
        known = kept.find("reference")
        if known is None:
            rounded = reference.trace(inputs, precision)
            require_observed(rounded, names, reference.name, precision.name)
            known = errors_of(rounded, truths, carriers=True)
            del rounded
            kept.keep("reference", known)
        if not first:  # otherwise the verdict is known
            require_finite(known, reference.name, precision.name)
        progress(f"{candidate.name} in {precision.name}")
        rounded_trace = candidate.trace(inputs, precision)
        foreign = reference.foreign or candidate.foreign
        rounding = Rounding(known, errors_of(rounded_trace, truths), precision, foreign)
        beyond = rounding.beyond
        if beyond and not first and runs_nearby:
            errors = {site: truths[site].error(rounded_trace[site], carriers=True) for site in beyond}
            spread = rounding.spread({site: error.carriers for site, error in errors.items()})
            if beyond[0] not in spread:
                progress("rounding on nearby inputs")
                rounding = measure_nearby(inputs, runs_nearby(reference), candidate, rounding, spread)
                beyond = rounding.beyond
        coarse = next(iter(beyond), None)
        gates = {site: rounding.gate(site) for site in names}
        if coarse and not first and explainer:
            found = Explanation(explainer.explain_rounding(coarse, rounded_trace, truth, precision))
        del rounded_trace
        if coarse and not first:
            alone = each_alone(set(rounding.candidate), precision)
    shown = {site for site in names if site in exact and site in rounding.candidate}
    claims = set(names) if candidate.claims is None else candidate.claims
    diverging = first or coarse
    return ParityReport(
        title,
        reference.name,
        precision.name,
        results=tuple(
            SiteResult(
                site,
                oracles.get(site),
                exact[site],
                alone.get(site),
                rounding.candidate[site].rms,
                rounding.reference[site].rms,
                gates[site],
                rounding.candidate[site].reason,
            )
            for site in names
            if site in shown
        ),
        unobserved=tuple(site for site in names if site not in shown and site in claims),
        unmapped=tuple(site for site in problem.order if site not in shown and site not in claims),
        causes=found.causes,
        place=found.place,
        hidden=hidden_before(diverging, problem.order, shown) if diverging else (),
        order=tuple(problem.order),
        beyond=found.beyond,
        everywhere=problem.streams is None,
        nearby=rounding.nearby,
    )
