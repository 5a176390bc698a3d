"""Gradient parity: candidate against reference, backward, under the same two gates as forward.

Observed is the gradient with respect to every parameter, every site's activation and the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.porting import parameter_shapes
from vit_ref.sites import sites
from vit_ref.verify.backward import SEMANTIC_OBJECTIVES, Gradients, Objective, objectives_for
from vit_ref.verify.diagnosis import Cause, diagnose_gradient
from vit_ref.verify.gates import Error, error, numerical_gate, root_mean_square
from vit_ref.verify.parity import ParityReport, SiteResult, hf_tensors
from vit_ref.verify.precision import Precision, named
from vit_ref.verify.references import Reference, reference_for, refilled
from vit_ref.verify.trace import Progress, beside, require_float64, silent, storing


class Differentiable(Protocol):
    """An implementation that can be differentiated and perturbed at its sites; attributes as `Port` has them."""

    name: str
    claims: frozenset[str] | None
    stored: DTypeLike | None

    def gradients(self, pixels: NDArray, dtype: DTypeLike) -> Callable[[Objective], Gradients]:
        """A function from an objective to its gradients, computed in `dtype`.

        Parameters are stored in `dtype` itself or in at least float32.
        """
        ...


def check_gradients(
    title: str,
    config: ViTConfig,
    source: Checkpoint,
    pixels: NDArray,
    candidate: Differentiable,
    precision: str | DTypeLike | Precision = "float32",
    reference: str | Reference = "flax",
    *,
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Measures every gradient of the candidate against the reference's in float64.

    Args:
      title: which checkpoint or case, for the report.
      config: the model's configuration.
      source: the checkpoint.
      pixels: float32 images (B, height, width, C).
      candidate: the port under test.
      precision: whose rounding is judged, see `precision.named`.
      reference: who judges, one of `references.REFERENCES` that goes backward, by name or already filled.
      names: the gradients to compare, by default all of the model.
      progress: told what is being done next.

    Returns:
      One result a gradient: sites from the output back, parameters in the model's order, pixels. In float64 each holds
      the worst of `SEMANTIC_OBJECTIVES`. Rounding is pooled over all, as a root mean square: a single pull-back is
      lucky or unlucky (see `backward.RANDOM_COTANGENTS`).

    Raises:
      UnsupportedByReferenceError: NumPy judges, or stands in for FlaxViT, and has no backward pass.
      ReferenceUnavailableError: the reference is not installed.
    """
    asked = named(precision)
    tensors = hf_tensors(config, source) if asked.stored is not None or isinstance(reference, str) else {}
    judge = reference_for(config, tensors, reference) if isinstance(reference, str) else reference
    names = gradient_names(config) if names is None else names
    truth_of = judge.gradients(pixels, np.float64)
    exact_of = candidate.gradients(pixels, np.float64)
    # Of the parameters as they are stored, which the semantic gate has nothing to do with.
    stored_truth_of = truth_of
    if asked.stored is not None:
        judge, candidate = refilled(judge, asked.rounded(tensors)), storing(candidate, asked.stored)
        stored_truth_of = judge.gradients(pixels, np.float64)
    with asked.asked():
        yardstick_of = judge.gradients(pixels, asked.dtype)
        rounding_of = candidate.gradients(pixels, asked.dtype)

    exacts: list[dict[str, Error]] = []
    measuring: list[Future[tuple[dict[str, Error], dict[str, Error]]]] = []
    causes: tuple[Cause, ...] = ()
    objectives = objectives_for(config, len(pixels))
    for k, objective in enumerate(objectives, start=1):
        progress(f"gradients, objective {k} of {len(objectives)}")
        # The gradients of a real model take a gigabyte, their errors nothing: none outlives the turn after its own,
        # whose backward passes run while NumPy measures these.
        truth = truth_of(objective).named()
        require_float64(truth, judge.name)
        if k <= SEMANTIC_OBJECTIVES:
            exact = exact_of(objective).named()
            require_float64(exact, candidate.name)
            exacts.append(_errors(exact, truth))
            wrong = [name for name in names if name in exact and not exacts[-1][name].passes_semantic_gate]
            if wrong and not causes:
                causes = diagnose_gradient(truth[wrong[0]], wrong[0], exact[wrong[0]])
            del exact
        if asked.stored is not None:
            truth = stored_truth_of(objective).named()
            require_float64(truth, judge.name)
        rounded = yardstick_of(objective).named(), rounding_of(objective).named()
        if measuring:
            measuring[-1].result()
        measuring.append(beside(_both, *rounded, truth))
        del truth, rounded

    yardsticks, roundings = zip(*(measured.result() for measured in measuring), strict=True)
    own = {name: _pooled(yardsticks, name) for name in names}
    carriers = {name: sum(found[name].carriers for found in yardsticks) for name in names}
    observed = [name for name in names if all(name in found for found in (*exacts, *roundings))]
    results = []
    for name in observed:
        yardstick = max(own[mate] for mate in _layer(name, names))
        results.append(
            SiteResult(
                name,
                oracles=Error(0.0, 0.0),
                exact=max((found[name] for found in exacts), key=lambda error: error.rms),
                alone=None,
                rounding=_pooled(roundings, name),
                yardstick=yardstick,
                gate=numerical_gate(yardstick, asked.dtype, carriers[name], backward=True, foreign=judge.foreign),
            )
        )
    # Of a port that does not claim every site, a parameter may be unmapped, and a value seen only after it was used.
    missing = tuple(name for name in names if name not in observed)
    return ParityReport(
        title,
        judge.name,
        asked.name,
        tuple(results),
        unobserved=missing if candidate.claims is None else (),
        unmapped=() if candidate.claims is None else missing,
        what="gradients",
        causes=causes,
        order=tuple(names),
    )


def gradient_names(config: ViTConfig) -> list[str]:
    """Every gradient: sites from the output back, parameters in the model's order, pixels."""
    return [*(site.name for site in reversed(sites(config, 1))), *parameter_shapes(config), "pixels"]


def _errors(found: Mapping[str, NDArray], truth: Mapping[str, NDArray], *, carriers: bool = False) -> dict[str, Error]:
    return {
        name: error(found[name], value, _scale(name, truth), carriers=carriers)
        for name, value in truth.items()
        if name in found
    }


def _both(
    yardstick: Mapping[str, NDArray], rounding: Mapping[str, NDArray], truth: Mapping[str, NDArray]
) -> tuple[dict[str, Error], dict[str, Error]]:
    return _errors(yardstick, truth, carriers=True), _errors(rounding, truth)


def _pooled(found: Sequence[dict[str, Error]], name: str) -> float:
    return root_mean_square(np.array([errors[name].rms for errors in found]))


def _layer(name: str, names: Sequence[str]) -> list[str]:
    """The gradients that one yardstick serves: all parameters of a layer, any other by itself.

    A bias has too few elements to say what its own error typically is: over 33 of them the reference's was seen between
    half and twice its average. Its layer's kernel takes part in the same sums over all tokens.
    """
    layer, _, leaf = name.rpartition(".")
    return (
        [mate for mate in names if mate.rpartition(".")[0] == layer] if leaf in ("bias", "kernel", "scale") else [name]
    )


def _scale(name: str, truth: Mapping[str, NDArray]) -> float:
    """The root mean square that a gradient's error is relative to: its own, or its layer's where that is larger.

    The key's bias has no gradient at all: it adds the same to all scores of a query, which softmax ignores. What any
    implementation computes there is rounding, at the scale of the terms that cancel, which is the kernel's.
    """
    own = root_mean_square(truth[name])
    kernel = name.removesuffix("bias") + "kernel"
    return max(own, root_mean_square(truth[kernel])) if name.endswith(".bias") and kernel in truth else own
