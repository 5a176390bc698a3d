"""What is sharded: a model whose dimensions tell axes apart, and the ways to lay it on eight devices.

Eight devices or four divide the width and the heads, two the hidden units besides; tokens, classes, channels and the
heads' width are prime or odd. Query and the other kernels are large enough to be divided by FSDP, the head is not.
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
    """A mesh, devices along "data" and along "model", and a kind of sharding on it."""

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


# At every site and for every gradient are judged: what divides a sum, alone and with all else at once. What the others
# divide these divide, too; of those the logits are judged. Each way takes ten seconds to compile.
JUDGED = ("tensor-1x8", "fsdp+tensor-4x2")


def digests(directory: Path) -> dict[str, str]:
    """What a directory's files hold, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
