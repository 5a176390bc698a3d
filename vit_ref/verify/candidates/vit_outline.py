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
    """The outline of a ViT.

    Args:
      config: the model's configuration.
    """

    takes_first = False

    def __init__(self, config: ViTConfig):
        self.config = config
        self.output = output_site(config)
        self.example = np.empty((1, *config.image_hw, 0))

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """Implements `Outline.shapes`, for images (B, height, width, C)."""
        batch, height, width, *_ = inputs.shape
        return {site.name: site.shape for site in sites(self.config, batch, (height, width))}

    def parameters(self) -> Mapping[str, Shape]:
        """Implements `Outline.parameters`."""
        return list_parameters(self.config)

    def numbers(self, pattern: str, known: Container[str]) -> Iterable[int]:
        """Implements `Outline.numbers`: returns the numbers of all blocks."""
        return range(self.config.num_hidden_layers)

    def optional(self, what: str) -> Container[str]:
        """Implements `Outline.optional`.

        One table may serve checkpoints with and without a head, and with and without biases of query, key and value.
        """
        if what == "sites":
            return OUTPUTS.keys()
        blocks = range(self.config.num_hidden_layers)
        biases = {f"blocks.{i}.attn.{role}.bias" for i in blocks for role in ("query", "key", "value")}
        return biases | {f"{layer}.{part}" for layer in ("pooler", "head") for part in ("kernel", "bias")}

    def goes_past(self, site: str) -> bool:
        """Implements `Outline.goes_past`. The token stream goes past the norm that it enters."""
        return site in ("embeddings", "norm") or site.endswith((".norm1", ".residual"))

    def recognise(self, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Implements `Outline.recognise`. It recognises this package's names and those of known layouts."""
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
        """Implements `Outline.require_output`. Without a head and a pooler, the output of a ViT must be one token."""
        if self.output == "cls" and len(output.shape) == 3:
            raise CandidateError(
                f"{name}: it returned shape {tuple(output.shape)}, but a model without a head must return the"
                " cls token (B, D): give call=lambda model, images: model(images)[:, 0]"
            )
