"""Finds, in a pass of PyTorch that kept its graph, the values that are used in one place only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

import torch

# A node of autograd's graph, and the number of its output.
Edge = tuple[Any, int]
# Operations that only move elements or change their dtype. What goes past before one goes past after it.
_MOVES = {"View", "UnsafeView", "ReshapeAlias", "Alias", "Transpose", "T", "Permute", "Unsqueeze", "Squeeze", "Expand"}
_MOVES |= {"ToCopy", "Clone"}


def find_used_once(output: torch.Tensor, marked: Mapping[str, Edge]) -> Set[str]:
    """Returns the sites whose values are used by nothing but their mark.

    Args:
      output: what the pass returned.
      marked: by site, where its value came from. Later operations use a view of the value, which is its mark.
    """
    uses: Counter[Edge] = Counter()
    left = [] if output.grad_fn is None else [output.grad_fn]
    seen = set(left)
    while left:
        for edge in left.pop().next_functions:
            uses[edge] += 1
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                left.append(edge[0])
    found = set()
    for site, edge in marked.items():
        while uses[edge] == 1 and re.sub(r"Backward\d*$", "", edge[0].name()) in _MOVES:
            (edge,) = edge[0].next_functions
        if uses[edge] == 1:
            found.add(site)
    return found
