"""Describes a ViT to the engine: its problem, its tensors under the reference's names, and what explains its faults."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites, stream_before
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.diagnose.diagnosis import beyond_rounding, diagnose, diagnose_gradient, diagnose_rounding, where
from vit_ref.verify.precision import Precision
from vit_ref.verify.problem import Problem
from vit_ref.verify.results import Cause, Explanation
from vit_ref.weights import layouts, mapping
from vit_ref.weights.checkpoint import Checkpoint


class ViTExplainer:
    """Explains divergences of a ViT by known bugs, see `Explainer`.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's tensors under Hugging Face's names. Gradients are explained without them.
      problem: what is compared.
    """

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray], problem: Problem):
        self._config, self._tensors, self._problem = config, tensors, problem

    def explain_formula(self, site: str, shown: Trace, truth: Trace) -> Explanation:
        """See `Explainer.explain_formula`."""
        config, tensors, names = self._config, self._tensors, self._problem.names
        pixels = np.asarray(self._problem.inputs)
        causes = diagnose(config, tensors, pixels, truth, names, site, shown)
        place = where(shown[site], truth[site], site)
        if not causes or not causes[0].format:
            return Explanation(causes, place)
        other, off, more = beyond_rounding(config, tensors, pixels, names, causes[0], shown)
        return Explanation(causes + more, place, f"{other}, relative RMS error {off:.1e}" if other else "")

    def explain_rounding(self, site: str, shown: Trace, truth: Trace, precision: Precision) -> tuple[Cause, ...]:
        """See `Explainer.explain_rounding`."""
        return diagnose_rounding(self._config, precision.rounded(self._tensors), site, shown, truth)

    def explain_gradient(self, name: str, value: NDArray, truth: NDArray) -> Explanation:
        """See `Explainer.explain_gradient`."""
        # The axes of a parameter have no names.
        placed = name == "pixels" or name in self._problem.shapes
        return Explanation(diagnose_gradient(truth, name, value), where(value, truth, name) if placed else "")


def problem_of(config: ViTConfig, pixels: NDArray) -> Problem:
    """Returns the problem of a ViT's configuration.

    Args:
      config: the model's configuration.
      pixels: float32 images (B, height, width, C).
    """
    shapes = {site.name: site.shape for site in sites(config, len(pixels), pixels.shape[1:3])}
    return Problem(
        pixels,
        shapes,
        streams={site: stream_before(site, config.num_hidden_layers) for site in shapes},
        output=list(shapes.values())[-1],
        gradients=tuple(gradient_names(config)),
    )


def gradient_names(config: ViTConfig) -> list[str]:
    """Returns the names of all gradients: sites, then parameters, each in the order of backpropagation, then pixels.

    Args:
      config: the model's configuration.
    """
    return [
        *(site.name for site in reversed(sites(config, 1))),
        *sorted(list_parameters(config), key=_from_the_output),
        "pixels",
    ]


_LAYERS = ("head", "pooler", "norm", "blocks", "position_embeddings", "cls_token", "patch")
_IN_A_BLOCK = ("mlp.fc2", "mlp.fc1", "norm2", "attn.out", "attn.value", "attn.key", "attn.query", "norm1")


def _from_the_output(path: str) -> tuple[int, int, int]:
    """Returns how far a parameter is from the output, as a key to sort by."""
    layer, _, rest = path.partition(".")
    if layer != "blocks":
        return _LAYERS.index(layer), 0, 0
    block, _, inside = rest.partition(".")
    return _LAYERS.index(layer), -int(block), _IN_A_BLOCK.index(inside.rpartition(".")[0])


def hf_tensors(config: ViTConfig, source: Checkpoint) -> dict[str, NDArray]:
    """Returns a checkpoint's tensors under Hugging Face's names, as the reference and the oracle read them.

    Files with those names are passed on unchanged, so the weight map has no part in judging itself. The weight map
    renames other layouts, and the tests of `-m porting` check that.

    Args:
      config: the model's configuration.
      source: the checkpoint.
    """
    layout = mapping.detect(source.tensors)
    if layout is layouts.HF:
        return dict(source.tensors)
    return mapping.export(mapping.port(source.tensors, config, layout), config, layouts.HF)
