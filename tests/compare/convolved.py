"""A small convolutional model: the reference in PyTorch, channels first; the candidate in NNX, channels last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import vit_ref


class Pair(nnx.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Conv(3, 5, (3, 3), rngs=rngs), nnx.Conv(5, 5, (3, 3), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.first(x))


class Model(nnx.Module):
    """The candidate. Its first container returns what that container's last layer returns."""

    def __init__(self, weights: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]):
        self.pair, self.out = Pair(), nnx.Conv(5, 2, (1, 1), rngs=nnx.Rngs(0))
        for name, layer in {"block.0": self.pair.first, "block.1": self.pair.last, "head": self.out}.items():
            weight = change(weights["block.1.weight"]) if name == "block.1" else weights[f"{name}.weight"]
            layer.kernel[...] = jnp.asarray(weight.permute(2, 3, 1, 0).numpy(), "float32")
            layer.bias[...] = jnp.asarray(weights[f"{name}.bias"].numpy(), "float32")

    def __call__(self, image: Any) -> Any:
        return self.out(self.pair(image))


def _load() -> torch.nn.Module:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d
    block = torch.nn.Sequential(conv(3, 5, 3, padding=1), conv(5, 5, 3, padding=1), torch.nn.Dropout())
    return torch.nn.Sequential(OrderedDict(block=block, head=conv(5, 2, 1))).eval()


def reference() -> vit_ref.Reference:
    """Declares the reference."""
    return vit_ref.Reference(
        load=lambda checkpoint: _load(),
        inputs=lambda seed: {"image": np.random.default_rng(seed).normal(size=(2, 7, 8, 3))},
        adapt=lambda image: image.transpose(0, 3, 1, 2),
        output=lambda value: value.permute(0, 2, 3, 1),
        name="convolutions",
    )


def candidate(
    change: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight, sites: dict[str, Any] | None = None
) -> vit_ref.Candidate:
    """Declares the candidate.

    Args:
      change: what it does to the kernel of `block.1`, in PyTorch's order of axes.
      sites: its table.
    """
    return vit_ref.Candidate(
        load=lambda checkpoint, reference: Model(reference.state_dict(), change), sites=sites or {}, name="nnx"
    )
