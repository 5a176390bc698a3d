"""One parity check: a candidate against the reference and the oracle, at every site, forward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import OraclesDifferError, ReferenceOverflowError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites, stream_before
from vit_ref.verify.compare.trace import (
    Implementation,
    Progress,
    Trace,
    beside,
    require_float64,
    silent,
    storing,
    widened,
)
from vit_ref.verify.diagnose.diagnosis import beyond_rounding, diagnose, diagnose_rounding, where
from vit_ref.verify.diagnose.gaps import hidden_before
from vit_ref.verify.gates import SEMANTIC_RMS, Error, Truth, against, errors_of, numerical_gate
from vit_ref.verify.precision import Precision, named
from vit_ref.verify.references.choice import Reference, reference_for, refilled
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.results import Cause, ParityReport, SiteResult
from vit_ref.weights import mapping
from vit_ref.weights.checkpoint import Checkpoint


class Port(Implementation, Protocol):
    """The implementation under test. Its activations can be replaced, so that a block can be judged alone.

    Attributes:
      claims: the sites that it promises to show, None for all.
      fixed: those at which nothing can be replaced.
      stored: the dtype that its parameters are rounded to, below float64; None for as it loaded them.
      foreign: whether it is no jax program, see `gates.ALLOWANCES`.
    """

    claims: frozenset[str] | None
    fixed: frozenset[str]
    stored: DTypeLike | None
    foreign: bool

    def trace(self, pixels: NDArray, dtype: DTypeLike, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """As `Implementation.trace`; values in `replace` take the place of the candidate's own at those sites."""
        ...


def hf_tensors(config: ViTConfig, source: Checkpoint) -> dict[str, NDArray]:
    """A checkpoint's tensors under Hugging Face's names, as reference and oracle read them.

    Files with those names are handed over untouched: the weight map has no part in what judges it. Other layouts are
    renamed by the weight map, and `-m porting` vouches for that.
    """
    layout = mapping.detect(source.tensors)
    if layout is mapping.HF:
        return dict(source.tensors)
    return mapping.export(mapping.port(source.tensors, config, layout), config, mapping.HF)


def require_finite(yardsticks: Mapping[str, Error], name: str, precision: str) -> None:
    """Raises `ReferenceOverflowError` where one of the reference's errors is not finite."""
    beyond = [site for site, error in yardsticks.items() if not math.isfinite(error.rms)]
    if beyond:
        places = f"{len(beyond)} of {len(yardsticks)} places"
        raise ReferenceOverflowError(
            f"{name} itself is not finite in {precision} at {places}, first {{place}}: judge another precision",
            beyond[0],
        )


def require_agreement(oracles: Mapping[str, Error], reference: str, oracle: str) -> None:
    """Raises `OraclesDifferError` where the oracle is beyond the semantic gate from the reference."""
    beyond = [site for site, error in oracles.items() if not error.passes_semantic_gate]
    if beyond:
        places = f"{len(beyond)} of {len(oracles)} sites"
        raise OraclesDifferError(
            f"{reference} and {oracle} differ in float64 at {places}, first {{place}} by"
            f" {against(oracles[beyond[0]].rms, SEMANTIC_RMS)}: one of the two is wrong, and neither can judge",
            beyond[0],
        )


def check_parity(
    title: str,
    config: ViTConfig,
    source: Checkpoint,
    pixels: NDArray,
    candidate: Port,
    precision: str | DTypeLike | Precision = "float32",
    reference: str | Reference = "flax",
    *,
    progress: Progress = silent,
) -> ParityReport:
    """Observes reference, oracle and candidate on the same images and measures every site.

    Args:
      title: which checkpoint or case, for the report.
      config: the model's configuration.
      source: the checkpoint.
      pixels: float32 images (B, height, width, C).
      candidate: the port under test.
      precision: whose rounding is judged, see `precision.named`.
      reference: who judges, one of `references.REFERENCES`, by name or already filled.
      progress: told what is being done next.

    Raises:
      TruncatedError: an oracle did not compute in float64, or nothing of the candidate did.
      OraclesDifferError: reference and oracle do not agree.
      InputError: the checkpoint does not fit, or the reference is not installed, or not finite in that precision.
    """
    asked = named(precision)
    tensors = hf_tensors(config, source)
    judge = reference_for(config, tensors, reference) if isinstance(reference, str) else reference
    oracle = NumpyOracle(config, tensors)
    names = [site.name for site in sites(config, len(pixels), pixels.shape[1:3])]
    return compare(title, config, tensors, pixels, names, judge, oracle, candidate, asked, progress=progress)


def compare(
    title: str,
    config: ViTConfig,
    tensors: Mapping[str, NDArray],
    pixels: NDArray,
    names: list[str],
    judge: Reference,
    oracle: Implementation,
    candidate: Port,
    asked: Precision,
    *,
    explain: bool = True,
    progress: Progress = silent,
) -> ParityReport:
    """What `check_parity` does once all are filled with the checkpoint's tensors.

    Args:
      title: as there.
      config: as there.
      tensors: the checkpoint's, under Hugging Face's names.
      pixels: as there.
      names: the sites to compare, which judge and oracle show, in order.
      judge: the reference.
      oracle: the NumPy oracle.
      candidate: as there.
      asked: whose rounding is judged.
      explain: whether to look for the cause of a divergence.
      progress: as there.
    """
    # NumPy multiplies while the reference is traced and compiled.
    numpy = beside(oracle.trace, pixels, np.float64)
    progress(f"{judge.name} in float64")
    truth = judge.trace(pixels, np.float64)
    require_float64(truth, judge.name)
    if set(truth) != set(names):
        raise AssertionError(f"{judge.name} was not observed at {sorted(set(truth) ^ set(names))}")

    # Their errors are kept of all traces but this one, which of a real model take a gigabyte.
    truths = {site: Truth(truth[site]) for site in names}

    def each_alone(shown: set[str], dtype: DTypeLike) -> dict[str, Error]:
        progress("each block alone")
        before = {site: stream_before(site, config.num_hidden_layers) for site in shown}
        fed = {stream: truth[stream] for stream in before.values() if stream in shown - candidate.fixed}
        found = errors_of(candidate.trace(pixels, dtype, replace=fed), truths)
        return {site: found[site] for site, stream in before.items() if site in found and (not stream or stream in fed)}

    progress(f"{oracle.name} in float64")
    oracle_trace = numpy.result()
    require_float64(oracle_trace, oracle.name)
    oracles = errors_of(oracle_trace, truths)
    require_agreement(oracles, judge.name, oracle.name)
    del oracle_trace, numpy
    progress(f"{candidate.name} in float64")
    exact_trace = widened(candidate.trace(pixels, np.float64), candidate.name)
    exact = errors_of(exact_trace, truths)
    causes: tuple[Cause, ...] = ()
    alone: dict[str, Error] = {}
    place = beyond = ""
    first = next((site for site in names if site in exact and not exact[site].passes_semantic_gate), None)
    if first and explain:
        progress("looking for the cause")
        causes = diagnose(config, tensors, pixels, truth, names, first, exact_trace)
        place = where(exact_trace[first], truth[first], first)
        if causes and causes[0].format:
            site, off, more = beyond_rounding(config, tensors, pixels, names, causes[0], exact_trace)
            causes += more
            beyond = f"{site} by {off:.1e}" if site else ""
    del exact_trace
    if first:
        alone = each_alone(set(exact), np.float64)
    progress(f"{judge.name} in {asked.name}")
    if asked.stored is not None:
        # What rounding the parameters costs is no error of the port's: from here on the truth is of rounded ones.
        tensors = asked.rounded(tensors)
        judge, candidate = refilled(judge, tensors), storing(candidate, asked.stored)
        truth = judge.trace(pixels, np.float64)
        require_float64(truth, judge.name)
        truths = {site: Truth(truth[site]) for site in names}
    with asked.asked():
        yardsticks = errors_of(judge.trace(pixels, asked.dtype), truths, carriers=True)
        if not first:  # else the verdict stands
            require_finite(yardsticks, judge.name, asked.name)
        progress(f"{candidate.name} in {asked.name}")
        rounded_trace = candidate.trace(pixels, asked.dtype)
    rounding = errors_of(rounded_trace, truths)
    foreign = judge.foreign or candidate.foreign
    gates = {
        site: numerical_gate(yardsticks[site].rms, asked.dtype, yardsticks[site].carriers, foreign=foreign)
        for site in names
    }
    coarse = next((site for site in names if site in rounding and rounding[site].rms > gates[site]), None)
    if coarse and not first and explain:
        causes = diagnose_rounding(config, tensors, coarse, rounded_trace, truth)
    del rounded_trace
    if coarse and not first:
        with asked.asked():
            alone = each_alone(set(rounding), asked.dtype)
    shown = {site for site in names if site in exact and site in rounding}
    claims = set(names) if candidate.claims is None else candidate.claims
    diverging = first or coarse
    return ParityReport(
        title,
        judge.name,
        asked.name,
        results=tuple(
            SiteResult(
                site,
                oracles[site],
                exact[site],
                alone.get(site),
                rounding[site].rms,
                yardsticks[site].rms,
                gates[site],
                rounding[site].reason,
            )
            for site in names
            if site in shown
        ),
        unobserved=tuple(site for site in names if site not in shown and site in claims),
        unmapped=tuple(site for site in names if site not in shown and site not in claims),
        causes=causes,
        place=place,
        hidden=hidden_before(diverging, names, shown) if diverging else (),
        order=tuple(names),
        beyond=beyond,
    )
