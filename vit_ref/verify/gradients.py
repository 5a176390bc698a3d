"""Gradient parity: candidate against reference, backward, under the same two gates as forward.

Observed is the gradient with respect to every parameter, every site's activation and the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.checkpoint import Checkpoint
from vit_ref.config import ViTConfig
from vit_ref.porting import parameter_shapes
from vit_ref.sites import sites
from vit_ref.verify.backward import Gradients, Objective, objectives_for
from vit_ref.verify.flaxvit import FlaxViTReference
from vit_ref.verify.gates import Error, error, numerical_gate, root_mean_square
from vit_ref.verify.parity import ParityReport, SiteResult, hf_tensors
from vit_ref.verify.trace import require_float64


class Differentiable(Protocol):
    """An implementation that can be differentiated and perturbed at its sites."""

    name: str

    def gradients(self, pixels: NDArray, dtype: DTypeLike, objectives: tuple[Objective, ...]) -> list[Gradients]:
        """One forward and backward pass for each objective, computed in `dtype` from parameters of at least float32."""
        ...


def check_gradients(
    title: str,
    config: ViTConfig,
    source: Checkpoint,
    pixels: NDArray,
    candidate: Differentiable,
    precision: DTypeLike = np.float32,
) -> ParityReport:
    """Measures every gradient of the candidate against FlaxViT's in float64.

    Args:
      title: which checkpoint or case, for the report.
      config: the model's configuration.
      source: the checkpoint.
      pixels: float32 images (B, height, width, C).
      candidate: the port under test.
      precision: the dtype whose rounding is judged.

    Returns:
      One result a gradient: sites from the output back, parameters in the model's order, pixels. In float64 each holds
      the worst of the objectives. Rounding is pooled over them, as a root mean square: a single pull-back of the
      reference came out up to 2.5 times luckier than its average.

    Raises:
      UnsupportedByReferenceError: FlaxViT cannot express the configuration; the NumPy oracle has no backward pass.
      ReferenceUnavailableError: FlaxViT is not installed.
    """
    reference = FlaxViTReference(config, hf_tensors(config, source))
    objectives = objectives_for(config, len(pixels))
    truths = [gradients.named() for gradients in reference.gradients(pixels, np.float64, objectives)]
    exacts = [gradients.named() for gradients in candidate.gradients(pixels, np.float64, objectives)]
    for truth, exact in zip(truths, exacts, strict=True):
        require_float64(truth, reference.name)
        require_float64(exact, candidate.name)
    yardsticks = [gradients.named() for gradients in reference.gradients(pixels, precision, objectives)]
    roundings = [gradients.named() for gradients in candidate.gradients(pixels, precision, objectives)]
    backward = [site.name for site in reversed(sites(config, len(pixels)))]
    names = [*backward, *parameter_shapes(config), "pixels"]
    observed = [name for name in names if all(name in gradients for gradients in (*exacts, *roundings))]
    scales = [{name: _scale(name, truth) for name in names} for truth in truths]

    def errors(found: list[dict[str, NDArray]], name: str) -> list[Error]:
        each = zip(found, truths, scales, strict=True)
        return [error(gradients[name], truth[name], scale[name]) for gradients, truth, scale in each]

    def pooled(found: list[dict[str, NDArray]], name: str) -> float:
        return root_mean_square(np.array([each.rms for each in errors(found, name)]))

    own = {name: pooled(yardsticks, name) for name in names}
    results = []
    for name in observed:
        yardstick = max(own[mate] for mate in _layer(name, names))
        results.append(
            SiteResult(
                name,
                oracles=Error(0.0, 0.0),
                exact=max(errors(exacts, name), key=lambda found: found.rms),
                alone=None,
                rounding=pooled(roundings, name),
                yardstick=yardstick,
                gate=numerical_gate(yardstick, precision),
            )
        )
    unobserved = tuple(name for name in names if name not in observed)
    return ParityReport(title, reference.name, np.dtype(precision).name, tuple(results), unobserved, what="gradients")


def _layer(name: str, names: list[str]) -> list[str]:
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
