"""The sites: the named values of the forward pass that the suite compares between implementations, in order.

Letters in the shapes: B batch, P patches, N tokens (P + 1), D hidden_size, H heads, K head_dim, M intermediate_size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from vit_ref.model.config import ViTConfig

# The sites of a block, in the order of the computation. `mlp.fc1` is before the activation, `mlp.hidden` after it. The
# two residuals are the token stream after the addition of attention and after that of the MLP.
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

# The output of a model is one of these. A model without head and pooler returns the cls token of the normalised tokens.
OUTPUTS: dict[str, str] = {"logits": "BL", "pooler": "BO", "cls": "BD"}

_WIDE = ("embeddings", "norm1", "residual", "norm2", "norm", "cls")


class Site(NamedTuple):
    """Site of one configuration: its name and the shape of its value."""

    name: str
    shape: tuple[int, ...]

    def dtype(self, computation: DTypeLike) -> np.dtype:
        """Returns the dtype of the value in a model that computes in `computation`.

        It is `computation` itself, except for the token stream and its LayerNorms, which stay in at least float32.
        """
        wide = self.name.rpartition(".")[2] in _WIDE
        return np.promote_types(computation, np.float32) if wide else np.dtype(computation)


def sites(config: ViTConfig, batch: int, image_hw: tuple[int, int] | None = None) -> tuple[Site, ...]:
    """Lists the sites of a forward pass, in the order in which a tap is called with them.

    Args:
      config: the model's configuration.
      batch: number of images.
      image_hw: (height, width) of the images in pixels; None for the configuration's own size.

    Returns:
      Names and shapes. No computation is run.
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
    shapes = [("patches", "BPD"), ("embeddings", "BND")]
    shapes += [(f"block.{i}.{site}", shape) for i in range(config.num_hidden_layers) for site, shape in BLOCK_SITES]
    shapes += [("norm", "BND"), (output := output_site(config), OUTPUTS[output])]
    return tuple(Site(name, tuple(size[letter] for letter in shape)) for name, shape in shapes)


def output_site(config: ViTConfig) -> str:
    """Returns the name of the last site, the model's output."""
    return "logits" if config.num_labels else "pooler" if config.pooler else "cls"


def stream_before(site: str, depth: int) -> str | None:
    """Returns the site of the token stream that enters `site`'s block, or None for sites before the first block.

    Replacing the stream there by the reference's value isolates the block: what diverges after it diverges in it.

    Args:
      site: name of a site.
      depth: number of blocks.
    """
    if site in ("patches", "embeddings"):
        return None
    block = int(site.split(".")[1]) if site.startswith("block.") else depth
    return f"block.{block - 1}.mlp.residual" if block else "embeddings"
