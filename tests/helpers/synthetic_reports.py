"""Reports made by hand, for tests of how a report looks and not of how it was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from vit_ref.model.sites import BLOCK_SITES
from vit_ref.verify.gates import Error
from vit_ref.verify.results import Behaviour, CandidateReport, Cause, ParityReport, SiteResult
from vit_ref.weights.origin import Extent, Origin

LEAVES = [
    *(f"{layer}.{leaf}" for layer in ("norm1", "norm2") for leaf in ("scale", "bias")),
    *(f"attn.{layer}.{leaf}" for layer in ("query", "key", "value", "out") for leaf in ("kernel", "bias")),
    *(f"mlp.{layer}.{leaf}" for layer in ("fc1", "fc2") for leaf in ("kernel", "bias")),
]
ORIGIN = Origin("tiny", "/weights/tiny", "0123456789abcdef" * 4, "fedcba9876543210")
ENVIRONMENT = {"jax": "0.10.2", "device": "cpu (cpu, x86_64)"}


def measured(site: str, exact: float = 2e-16, alone: float | None = None, **fields: Any) -> SiteResult:
    """Returns the result of one site. It passes unless the caller gives other numbers."""
    numbers = {"rounding": 1.1e-7, "reference_error": 9e-8, "gate": 3e-7, **fields}
    apart = None if alone is None else Error(alone, 2 * alone)
    return SiteResult(site, Error(1.5e-16, 2.5e-16), Error(exact, 3 * exact), apart, **numbers)


def parity(*results: SiteResult, **fields: Any) -> ParityReport:
    """Returns a pass with these sites, in that order."""
    order = tuple(result.site for result in results)
    given = {"title": "tiny", "precision": "float32", "results": results, "order": order, **fields}
    return ParityReport(reference="FlaxViT", **given)


def ported(forward: ParityReport, backward: ParityReport | None = None, **fields: Any) -> CandidateReport:
    """Returns a whole report."""
    behaviour = (Behaviour("repeat", 0.0, ""), Behaviour("inputs", None, ""))
    given = {"title": "tiny", "candidate": "mine", "behaviour": behaviour, "environment": ENVIRONMENT, **fields}
    given = {"checkpoint": ORIGIN, **given}
    reason = "" if backward else "not requested"
    return CandidateReport(
        **{"reference": "FlaxViT", "precision": forward.precision, "not_backward": reason, "expected_failed_checks": {}}
        | {"forward": forward, "backward": backward}
        | given
    )


def wrong(depth: int = 2) -> CandidateReport:
    """Returns the report of a candidate that is wrong from its first LayerNorm on, with one right gradient."""
    names = [f"block.{i}.{site}" for i in range(depth) for site, _ in BLOCK_SITES]
    names = ["patches", "embeddings", *names, "norm", "logits"]
    numbers = itertools.cycle((5.6e-7, 2.1e-4, 9.9e-5))
    bad = {name: next(numbers) for name in names[2:]}
    sites = [
        measured(name, bad[name], bad[name] / 7, rounding=bad[name] * 1.01)
        if name in bad
        else measured(name, 0.0, 1e-16)
        for name in names
    ]
    parameters = ["cls_token", "position_embeddings", "patch.kernel", "patch.bias"]
    parameters += [f"blocks.{i}.{leaf}" for i in range(depth) for leaf in LEAVES]
    parameters += ["norm.scale", "norm.bias", "head.kernel", "head.bias"]
    gradients = [*reversed(names), *parameters, "pixels"]
    cause = Cause("LayerNorm epsilon 1e-06", names[2], bad[names[2]], 1.7e-16)
    return ported(
        parity(*sites, causes=(cause,), place="only at image 1 of 4", hidden=("embeddings",)),
        parity(
            measured(gradients[0]),
            *(measured(name, 3.3e-5, rounding=4.4e-5) for name in gradients[1:]),
            what="gradients",
        ),
    )


def _unshown() -> CandidateReport:
    sites = ("patches", "embeddings", "block.0.norm1", "logits")
    return ported(parity(measured("logits"), unmapped=sites[:3], order=sites))


def _stopped() -> CandidateReport:
    """Returns the report of a run that a wrong formula ended before rounding was measured."""
    unmeasured = dict.fromkeys(("rounding", "reference_error", "gate"), math.nan)
    sites = [
        measured("patches", **unmeasured),
        measured("norm", 1e-6, 1e-6, **unmeasured),
        measured("logits", 1e-6, 1e-9, **unmeasured),
    ]
    return ported(parity(*sites), behaviour=(), not_backward="not run", not_behaviour="not run")


def _expected() -> CandidateReport:
    sites = [measured("embeddings"), measured("block.0.norm1", 1e-6), measured("logits", 1e-6)]
    return ported(
        parity(*sites), expected_failed_checks={"block.*": "known", "embeddings": "was wrong once", "l*": "known"}
    )


def _infinite() -> CandidateReport:
    sites = [
        measured("norm", math.inf, math.inf, rounding=math.inf, reference_error=math.inf, gate=math.inf),
        measured("logits", rounding=0.0),
    ]
    return ported(parity(*sites, unobserved=("patches",)))


def _misbehaving() -> CandidateReport:
    forward = parity(measured("logits"))
    return ported(
        forward, behaviour=(Behaviour("batch", 0.25, "an input alone gives another output than in its batch"),)
    )


def _cut() -> CandidateReport:
    title = "a cut of tiny"
    return ported(
        parity(measured("logits"), title=title), title=title, cut=Extent((0, 11), (4, 4), (56, 56), tensors=40)
    )


REPORTS: dict[str, Callable[[], CandidateReport]] = {
    "right": lambda: ported(parity(measured("patches", 0.0), measured("logits"))),
    "wrong": wrong,
    "output alone is shown": _unshown,
    "expected failures": _expected,
    "no numbers": _infinite,
    "rounding": lambda: ported(parity(measured("norm", alone=7.7e-7, rounding=8e-7), measured("logits", alone=1e-7))),
    "misbehaving": _misbehaving,
    "stopped at a wrong formula": _stopped,
    "a cut": _cut,
}
