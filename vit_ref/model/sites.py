"""The sites: the named points of the forward pass at which every implementation is observed, in order.

Letters in the shapes: B batch, P patches, N tokens (P + 1), D hidden_size, H heads, K head_dim, M intermediate_size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from vit_ref.model.config import ViTConfig

# One block, in the order of its computation. `mlp.fc1` is before the activation, `mlp.hidden` after it; the two
# residuals are the token stream after the attention's and after the MLP's addition.
BLOCK_SITES: tuple[tuple[str, str], ...] = (
    ("norm1", "BND"),
    ("attn.query", "BNHK"),
    ("attn.key", "BNHK"),
    ("attn.value", "BNHK"),
    ("attn.probs", "BHNN"),
    ("attn.context", "BND"),
    ("attn.out", "BND"),
    ("attn.residual", "BND"),
    ("norm2", "BND"),
    ("mlp.fc1", "BNM"),
    ("mlp.hidden", "BNM"),
    ("mlp.out", "BND"),
    ("mlp.residual", "BND"),
)

# A model's output is one of these. Of the normalised tokens a model without head and pooler returns the cls token.
OUTPUTS: dict[str, str] = {"logits": "BL", "pooler": "BO", "cls": "BD"}

_WIDE = ("embeddings", "norm1", "residual", "norm2", "norm", "cls")


class Site(NamedTuple):
    """A site of one configuration: its name and the shape of its value."""

    name: str
    shape: tuple[int, ...]

    def dtype(self, computation: DTypeLike) -> np.dtype:
        """The dtype of the value in a model that computes in `computation`.

        That dtype itself, except for the token stream and its LayerNorms, which stay in at least float32.
        """
        wide = self.name.rpartition(".")[2] in _WIDE
        return np.promote_types(computation, np.float32) if wide else np.dtype(computation)


def sites(config: ViTConfig, batch: int, image_hw: tuple[int, int] | None = None) -> tuple[Site, ...]:
    """All sites of a forward pass, in the order in which a tap sees them.

    Args:
      config: the model's configuration.
      batch: images in the batch.
      image_hw: (height, width) of the images in pixels; by default the configuration's own.

    Returns:
      Names and shapes, found without running anything.
    """
    rows, columns = config.grid(image_hw)
    size = {
        "B": batch,
        "P": rows * columns,
        "N": rows * columns + 1,
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.head_dim,
        "M": config.intermediate_size,
        "L": config.num_labels,
        "O": config.pooler_width,
    }
    named = [("patches", "BPD"), ("embeddings", "BND")]
    named += [(f"block.{i}.{site}", shape) for i in range(config.num_hidden_layers) for site, shape in BLOCK_SITES]
    named += [("norm", "BND"), (output := output_site(config), OUTPUTS[output])]
    return tuple(Site(name, tuple(size[letter] for letter in shape)) for name, shape in named)


def output_site(config: ViTConfig) -> str:
    """The site of a model's output, which is the last."""
    return "logits" if config.num_labels else "pooler" if config.pooler else "cls"


def stream_before(site: str, depth: int) -> str | None:
    """The site whose value is the token stream that enters `site`'s block; None for sites before the first block.

    Feeding a reference's value there isolates the block: what diverges after it diverges in it.

    Args:
      site: a site's name.
      depth: number of blocks.
    """
    if site in ("patches", "embeddings"):
        return None
    block = int(site.split(".")[1]) if site.startswith("block.") else depth
    return f"block.{block - 1}.mlp.residual" if block else "embeddings"
