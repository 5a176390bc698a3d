"""A model whose dimensions tell axes apart, and the ways to place it on eight devices.

Eight or four devices divide the width and the heads, and two divide the hidden units besides. Tokens, classes, channels
and the heads' width are prime or odd. FSDP divides query and the other kernels, which are large, but not the head.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

from vit_ref.verify.cases import CASES, Case

CASE = Case(
    "sharded",
    dataclasses.replace(
        CASES["rectangular"].config, hidden_size=88, num_attention_heads=8, num_hidden_layers=1, intermediate_size=104
    ),
    batch=8,
    seed=11,
)


class Way(NamedTuple):
    """A mesh with devices along "data" and "model", and a kind of sharding on it."""

    sharding: str
    data: int
    model: int

    def __str__(self) -> str:
        return f"{self.sharding}-{self.data}x{self.model}"


WAYS = {
    str(way): way
    for way in (
        Way("data", 8, 1),
        Way("fsdp", 8, 1),
        Way("tensor", 1, 8),
        Way("fsdp+tensor", 4, 2),
        Way("fsdp+tensor", 2, 4),
    )
}


# This way is compared at every site and for every gradient. It divides all that the others divide. The others are
# compared at the logits only, because each way takes ten seconds to compile.
JUDGED = "fsdp+tensor-4x2"


def digests(directory: Path) -> dict[str, str]:
    """Returns the digests of the files in a directory, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
