"""Attention maps of the cls token."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from vit_ref.model.vit import VisionTransformer

Method = Literal["last", "rollout"]


def compute_attention_maps(model: VisionTransformer, pixels: ArrayLike, method: Method = "last") -> NDArray:
    """Returns how much of what the cls token reads comes from each patch.

    Args:
      model: any model, in either mode. The function runs it in evaluation mode and does not change it.
      pixels: preprocessed images (B, height, width, C).
      method: "last" gives the attention probabilities of the last block, head by head. "rollout" combines all blocks,
        as Abnar & Zuidema do (2020, https://arxiv.org/abs/2005.00928). It multiplies, block by block, the mean over the
        heads, half of it replaced by the identity of the residual connection.

    Returns:
      (B, heads, rows, columns), float32; one "head" for "rollout". The sum of a map is below one, because the cls token
      also reads from itself.

    Raises:
      InputError: the images do not fit the model.
    """
    graph, state = nnx.split(model)
    maps = np.asarray(_maps(graph, state, jnp.asarray(pixels), method)).astype(np.float32)
    return maps.reshape(*maps.shape[:2], *model.config.grid())


@partial(jax.jit, static_argnums=(0, 3))
def _maps(graph: nnx.GraphDef, state: nnx.State, pixels: Array, method: Method) -> Array:
    """Returns the maps as (B, heads, patches)."""
    probabilities: list[Array] = []

    def tap(site: str, value: Array) -> Array:
        if site.endswith("attn.probs"):
            probabilities.append(value.astype(jnp.promote_types(value.dtype, jnp.float32)))
        return value

    model = nnx.merge(graph, state)
    model.eval()
    model(pixels, tap=tap)
    if method == "last":
        return probabilities[-1][:, :, 0, 1:]
    # The result needs only the cls token's row of the product, so multiply that row from the last block down.
    row = jnp.zeros_like(probabilities[0][:, 0, 0]).at[:, 0].set(1)
    for each in reversed(probabilities):
        row = row / 2 + jnp.einsum("bq,bqk->bk", row, each.mean(axis=1), precision="highest") / 2
    return row[:, None, 1:]
