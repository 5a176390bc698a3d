"""A pair: a reference from transformers with random weights, a candidate, and the candidate's mutants.

A new pair is a file beside this one with a `FAMILY`, and its mutants in `mutants.py` under the file's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flax import nnx
from mutants import MUTANTS, Mutant
from numpy.typing import NDArray

import vit_ref


def pixels(
    config: Mapping[str, Any], shape: tuple[int, ...], batch: int, rng: np.random.Generator
) -> dict[str, NDArray]:
    """Returns images (B, height, width, C)."""
    return {"pixel_values": rng.normal(size=(batch, *shape, config["num_channels"]))}


def channels_first(pixel_values: NDArray) -> dict[str, NDArray]:
    """Returns images (B, C, height, width)."""
    return {"pixel_values": pixel_values.transpose(0, 3, 1, 2)}


def token_ids(
    config: Mapping[str, Any], shape: tuple[int, ...], batch: int, rng: np.random.Generator
) -> dict[str, NDArray]:
    """Returns sentences (B, tokens)."""
    return {"input_ids": rng.integers(config["vocab_size"], size=(batch, *shape))}


def draw_vision(
    rng: np.random.Generator, head_dims: Sequence[int] = (2, 3, 5, 7)
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Returns the fields that every configuration of a vision model has, and the size of its images."""
    heads, patch, side = (int(rng.choice(values)) for values in ((1, 2, 3, 5), (1, 2, 3, 5), (2, 3, 4)))
    config = {
        "hidden_size": heads * int(rng.choice(head_dims)),
        "num_hidden_layers": int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": side * patch,
        "num_channels": int(rng.integers(1, 5)),
        "layer_norm_eps": float(rng.choice((1e-12, 1e-6, 1e-5, 1e-3))),
    }
    # Nothing sees what is left over beside the last patch.
    shape = tuple(int(rng.integers(1, 6)) * patch + int(rng.integers(patch)) for _ in range(2))
    return config, shape


def at_any_size(model: torch.nn.Module, **inputs: Any) -> Any:
    """Calls a model with the option to resize its positions."""
    return model(**inputs, interpolate_pos_encoding=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model: its reference from transformers, and its candidates.

    Attributes:
      name: of its mutants in `MUTANTS`.
      build: `build(config)`, the reference with its initial weights.
      model: `model(reference, **keywords)`, the candidate with the reference's weights.
      sites: `sites(config)`, the candidate's table.
      config: what `build` gets in the worked pair.
      shape: of the worked pair's inputs, without the batch: (height, width), or (tokens,).
      draw: `draw(rng)`, a configuration and a shape that are valid.
      output: what of the reference's output is compared.
      inputs: `inputs(config, shape, batch, rng)`.
      adapt: what the reference gets of them.
      call: `call(model, **inputs)` where the reference wants more than its inputs.
      parameters: the candidate's table of parameters; None: they are found by their values.
    """

    name: str
    build: Callable[[Mapping[str, Any]], torch.nn.Module]
    model: Callable[..., nnx.Module]
    sites: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    draw: Callable[[np.random.Generator], tuple[dict[str, Any], tuple[int, ...]]]
    output: Callable[[Any], Any]
    inputs: Callable[..., dict[str, NDArray]] = pixels
    adapt: Callable[..., Any] | None = channels_first
    call: Callable[..., Any] | None = None
    parameters: Mapping[str, Any] | None = None

    def reference(
        self,
        config: Mapping[str, Any] | None = None,
        shape: tuple[int, ...] | None = None,
        *,
        batch: int = 2,
        seed: int = 0,
    ) -> vit_ref.Reference:
        """Returns the worked reference, or one with another configuration."""
        config, shape = config or self.config, shape or self.shape
        return vit_ref.Reference(
            load=lambda checkpoint: randomised(self.build(config), seed),
            inputs=lambda seed: self.inputs(config, shape, batch, np.random.default_rng(seed)),
            adapt=self.adapt,
            call=self.call,
            output=self.output,
        )

    def candidate(self, config: Mapping[str, Any] | None = None, mutant: str | None = None) -> vit_ref.Candidate:
        """Returns the candidate that is right, or the mutant of that name."""
        bug = MUTANTS[self.name][mutant] if mutant else Mutant({}, "")
        sites = self.sites(config or self.config)
        return vit_ref.Candidate(
            load=lambda checkpoint, reference: self.model(reference, **bug.keywords),
            sites={path: site for path, site in sites.items() if path not in bug.without},
            parameters=self.parameters,
        )

    def mutants(self) -> SimpleNamespace:
        """Returns all mutants; `vit-ref compare` finds one as `FILE.py:wrong.NAME`."""
        return SimpleNamespace(**{mutant: self.candidate(mutant=mutant) for mutant in MUTANTS[self.name]})


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Returns the model with every parameter drawn anew, away from its initial value, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                gain = name.endswith(("weight", "lambda1"))
                parameter.copy_(noise / 4 + 1 if gain else noise / 4)
            elif any(word in name for word in ("token", "position", "probe")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()
