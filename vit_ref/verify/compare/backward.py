"""Gradient parity: candidate against reference, backward, under the same two gates as forward.

Observed is the gradient with respect to every parameter, every site's activation and the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.verify.compare.forward import hf_tensors, require_finite
from vit_ref.verify.compare.objectives import LOOKS, SEMANTIC_OBJECTIVES, Gradients, Objective, objectives_for
from vit_ref.verify.compare.pooling import Pooled
from vit_ref.verify.compare.trace import Progress, require_float64, silent, storing, widened
from vit_ref.verify.diagnose.diagnosis import diagnose_gradient, where
from vit_ref.verify.gates import Truth, errors_of
from vit_ref.verify.precision import Precision, named
from vit_ref.verify.references.choice import Reference, reference_for, refilled, with_fused_attention
from vit_ref.verify.results import ParityReport
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.mapping import parameter_shapes


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
      progress: told what is being done next.

    Returns:
      One result a gradient, see `gradient_names`. In float64 each holds
      the worst of `SEMANTIC_OBJECTIVES`. Rounding is pooled over as many objectives as it takes, see
      `pooling.Pooled.settled`, as a root mean square: a single pull-back is lucky or unlucky (see
      `backward.DARKER`).

    Raises:
      UnsupportedByReferenceError: NumPy judges, or stands in for FlaxViT, and has no backward pass.
      InputError: the formulas agree, and the reference is not finite in the tested precision.
      ReferenceUnavailableError: the reference is not installed.
    """
    asked = named(precision)
    tensors = hf_tensors(config, source) if asked.stored is not None or isinstance(reference, str) else {}
    judge = reference_for(config, tensors, reference) if isinstance(reference, str) else reference
    names = gradient_names(config)
    pooled = Pooled(names, asked.dtype, judge.foreign)
    comparison = Comparison(pixels, judge, candidate, asked, asked.rounded(tensors))
    objectives = objectives_for(config, len(pixels))
    for start, stop in pairwise((0, *LOOKS)):
        for k in range(start, stop):
            progress(f"gradients, objective {k + 1} of at most {len(objectives)}")
            comparison.measure(objectives[k], pooled)
        if pooled.settled:
            break
    if not pooled.passed and not pooled.wrong and _hides_probabilities(candidate, config):
        progress(f"gradients of {judge.name} with fused attention")
        comparison.measure_fused(objectives[:stop], pooled)
    return gradients_report(title, pooled, judge, asked, candidate.claims)


def _hides_probabilities(candidate: Differentiable, config: ViTConfig) -> bool:
    """Whether the candidate's attention may be a fused kernel: one that shows its probabilities computes with them."""
    probabilities = {site.name for site in sites(config, 1) if site.name.endswith(".attn.probs")}
    return candidate.claims is not None and not probabilities <= candidate.claims


class Comparison:
    """Reference and candidate, made ready to be differentiated.

    Args:
      pixels: float32 images (B, height, width, C).
      judge: the reference.
      candidate: the port under test.
      asked: whose rounding is judged.
      stored: the checkpoint's tensors as that precision stores them, where it says how.
      formula: whether the candidate is asked for float64 at all.

    Raises:
      UnsupportedByReferenceError: the reference has no backward pass.
    """

    def __init__(
        self,
        pixels: NDArray,
        judge: Reference,
        candidate: Differentiable,
        asked: Precision,
        stored: Mapping[str, NDArray] = MappingProxyType({}),
        *,
        formula: bool = True,
    ):
        self._pixels, self._precision = pixels, asked
        self._judge, self._candidate, self._asked = judge.name, candidate.name, asked.name
        self._placed = {"pixels", *(site.name for site in sites(judge.config, 1))}
        self._truth = judge.gradients(pixels, np.float64)
        self._exact = candidate.gradients(pixels, np.float64) if formula else None
        # Of the parameters as they are stored, which the semantic gate has nothing to do with.
        self._stored_truth = self._truth
        if asked.stored is not None:
            judge, candidate = refilled(judge, stored), storing(candidate, asked.stored)
            self._stored_truth = judge.gradients(pixels, np.float64)
        self._stored_judge = judge
        with asked.asked():
            self._yardstick = judge.gradients(pixels, asked.dtype)
            self._rounding = candidate.gradients(pixels, asked.dtype)

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
            if first in failed[-1] and all(cause.site != first for cause in pooled.causes):
                pooled.causes = diagnose_gradient(truth[first], first, exact[first])
                # A parameter's axes have no names.
                pooled.place = where(exact[first], truth[first], first) if first in self._placed else ""
            del exact
        if self._stored_truth is not self._truth:
            truth, truths = self._in_float64(self._stored_truth, objective)
        yardsticks = errors_of(self._yardstick(objective).named(), truths, carriers=True)
        if not pooled.wrong:  # else the verdict stands
            # In the order of the pass, which a compiled one's results have not.
            require_finite({name: yardsticks[name] for name in pooled.names}, self._judge, self._asked)
        pooled.yardsticks.append(yardsticks)
        pooled.roundings.append(errors_of(self._rounding(objective).named(), truths))

    def measure_fused(self, objectives: Sequence[Objective], pooled: Pooled) -> None:
        """Adds the reference's errors with fused attention, of the objectives that were measured.

        This is done last, and only for a candidate that fails: the reference compiles once more for it.
        """
        judge = with_fused_attention(self._stored_judge)
        with self._precision.asked():
            fused = judge.gradients(self._pixels, self._precision.dtype)
        for objective in objectives:
            _, truths = self._in_float64(self._stored_truth, objective)
            pooled.fused.append(errors_of(fused(objective).named(), truths, carriers=True))

    def _in_float64(
        self, gradients: Callable[[Objective], Gradients], objective: Objective
    ) -> tuple[dict[str, NDArray], dict[str, Truth]]:
        found = gradients(objective).named()
        require_float64(found, self._judge)
        return found, truths_of(found)


def gradients_report(
    title: str, pooled: Pooled, judge: Reference, asked: Precision, claims: frozenset[str] | None
) -> ParityReport:
    """The report of what was measured of a candidate that claims such sites."""
    # Of a port that does not claim every site, a parameter may be unmapped, and a value seen only after it was used.
    return ParityReport(
        title,
        judge.name,
        asked.name,
        pooled.results(),
        unobserved=pooled.missing if claims is None else (),
        unmapped=() if claims is None else pooled.missing,
        what="gradients",
        causes=pooled.causes,
        place=pooled.place,
        order=tuple(pooled.names),
        objectives=len(pooled.roundings),
    )


def gradient_names(config: ViTConfig) -> list[str]:
    """Every gradient: sites, then parameters, both in the order in which backpropagation meets them; and pixels."""
    return [
        *(site.name for site in reversed(sites(config, 1))),
        *sorted(parameter_shapes(config), key=_from_the_output),
        "pixels",
    ]


_LAYERS = ("head", "pooler", "norm", "blocks", "position_embeddings", "cls_token", "patch")
_IN_A_BLOCK = ("mlp.fc2", "mlp.fc1", "norm2", "attn.out", "attn.value", "attn.key", "attn.query", "norm1")


def _from_the_output(path: str) -> tuple[int, int, int]:
    """How far from the output a parameter is."""
    layer, _, rest = path.partition(".")
    if layer != "blocks":
        return _LAYERS.index(layer), 0, 0
    block, _, inside = rest.partition(".")
    return _LAYERS.index(layer), -int(block), _IN_A_BLOCK.index(inside.rpartition(".")[0])


def truths_of(gradients: Mapping[str, NDArray]) -> dict[str, Truth]:
    """Gradients in float64, each with the scale that errors are relative to: its own, or its layer's.

    The key's bias has no gradient at all: it adds the same to all scores of a query, which softmax ignores. What any
    implementation computes there is rounding, at the scale of the terms that cancel, which is the kernel's. The terms
    of a norm's bias may cancel too, where a model has one output: they are as large as those of its scale.
    """
    truths = {name: Truth(value) for name, value in gradients.items()}
    for name, value in gradients.items():
        mates = [truths.get(name.removesuffix("bias") + leaf) for leaf in ("kernel", "scale")]
        if name.endswith(".bias"):
            truths[name] = Truth(value, max([truths[name].rms, *(mate.rms for mate in mates if mate)]))
    return truths
