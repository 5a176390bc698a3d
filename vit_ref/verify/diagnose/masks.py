"""Predicts attention with another mask, from the right weights of attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.predictions import IMAGE, Prediction


def mask_otherwise(truth: NDArray) -> Iterator[Prediction]:
    """Yields weights with another mask, if the right value is one of weights (batch, heads, queries, keys).

    A mask takes the weight of some keys, and the others grow so that their sum is 1 again. The weights of keys that the
    right mask hides are not known, so no explanation shows them.

    Args:
      truth: the right value.
    """
    if truth.ndim != IMAGE or (truth < 0).any() or not np.allclose(truth.sum(axis=-1), 1, rtol=0, atol=1e-9):
        return
    queries, keys = truth.shape[-2:]
    # Keys may stand before the sequence, as those of a memory or of a cache do.
    before = keys - queries
    if before < 0:
        return
    row, column = np.ogrid[:queries, :keys]
    seen = {"no query attends to a later key": column <= row + before}
    if not (truth * ~seen["no query attends to a later key"]).any():
        seen = {"no query attends to its own key": column != row + before}
    if before:
        seen[f"no query attends to the first {before} keys"] = (column >= before) & (row >= 0)
    for label, mask in seen.items():
        kept = truth * mask
        sums = kept.sum(axis=-1, keepdims=True)
        yield Prediction(label, np.divide(kept, sums, out=np.zeros_like(kept), where=sums > 0))
