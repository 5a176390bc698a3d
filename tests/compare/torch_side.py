"""The small model of `sides` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch

import vit_ref
from tests.compare import sides


class Block(torch.nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(sides.WIDTH, eps=sides.EPSILON)
        self.fc1, self.act = torch.nn.Linear(sides.WIDTH, sides.HIDDEN), torch.nn.GELU()
        self.fc2 = torch.nn.Linear(sides.HIDDEN, sides.WIDTH)

    def forward(self, x: Any) -> Any:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Model(torch.nn.Module):
    """The model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(sides.WORDS, sides.WIDTH)
        self.proj = torch.nn.Linear(sides.FEATURES, sides.WIDTH)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(sides.BLOCKS)])
        self.head = torch.nn.Linear(sides.WIDTH, sides.OUT)

    def forward(self, ids: Any, features: Any) -> Any:
        x = self.embed(ids) + self.proj(features)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def loaded(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the weights that all sides have, in evaluation mode."""
    model.load_state_dict({name: torch.from_numpy(value) for name, value in sides.weights().items()})
    return model.eval()


def reference(model: type[torch.nn.Module] = Model, **fields: Any) -> vit_ref.Reference:
    """The model as the reference."""
    given = {"load": lambda checkpoint: loaded(model()), "inputs": sides.inputs, "name": "torch"}
    return vit_ref.Reference(**{**given, **fields})


def candidate() -> vit_ref.Candidate:
    """The model as the candidate, with all sites under their own names."""
    names = ["embed", "proj", "head", *(f"blocks.{{i}}{end}" for end in ("", ".norm", ".fc1", ".act", ".fc2"))]
    return vit_ref.Candidate(load=lambda checkpoint: loaded(Model()), sites={name: name for name in names}, name="twin")
