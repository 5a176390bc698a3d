"""The outline of a ViT: sites, parameters and blocks of a configuration."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import OUTPUTS, output_site, sites
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.candidates.outline import Shape
from vit_ref.weights import mapping


class ViTOutline:
    """See `Outline`.

    Args:
      config: the model's configuration.
    """

    takes_first = False

    def __init__(self, config: ViTConfig):
        self.config = config
        self.output = output_site(config)
        self.example = np.empty((1, *config.image_hw, 0))

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """See `Outline.shapes`; the inputs are images (B, height, width, C)."""
        batch, height, width, *_ = inputs.shape
        return {site.name: site.shape for site in sites(self.config, batch, (height, width))}

    def parameters(self) -> Mapping[str, Shape]:
        """See `Outline.parameters`."""
        return list_parameters(self.config)

    def numbers(self, pattern: str, known: Container[str]) -> Iterable[int]:
        """See `Outline.numbers`: those of all blocks."""
        return range(self.config.num_hidden_layers)

    def optional(self, what: str) -> Container[str]:
        """See `Outline.optional`.

        A table may serve checkpoints with a head and without one, with biases of query, key and value and without.
        """
        if what == "sites":
            return OUTPUTS.keys()
        blocks = range(self.config.num_hidden_layers)
        biases = {f"blocks.{i}.attn.{role}.bias" for i in blocks for role in ("query", "key", "value")}
        return biases | {f"{layer}.{part}" for layer in ("pooler", "head") for part in ("kernel", "bias")}

    def goes_past(self, site: str) -> bool:
        """See `Outline.goes_past`: the token stream goes past the norm that it enters."""
        return site in ("embeddings", "norm") or site.endswith((".norm1", ".residual"))

    def recognise(self, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """See `Outline.recognise`: the names are this package's or a known layout's; else it recognises none."""
        if gradients.keys() == list_parameters(self.config).keys():
            return dict(gradients)
        for separator in "./":
            named = {name.replace(".", separator): value for name, value in gradients.items()}
            try:
                return mapping.port(named, self.config, mapping.detect(named), finite=False)
            except MappingError:
                continue
        return {}

    def require_output(self, output: Any, name: str) -> None:
        """See `Outline.require_output`: without a head and a pooler, the output of a ViT is one token."""
        if self.output == "cls" and len(output.shape) == 3:
            raise CandidateError(
                f"{name}: it returned shape {tuple(output.shape)}, but a model without a head must return the"
                " cls token (B, D): give call=lambda model, images: model(images)[:, 0]"
            )
