"""A declared candidate that runs in JAX, as the engine judges it."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.model import Tap, identity
from vit_ref.pretrained import parameters_of_state
from vit_ref.verify.ports.adapters import adapted, is_float
from vit_ref.verify.ports.declaration import Candidate
from vit_ref.verify.ports.loading import claims, loaded, observed, recognised
from vit_ref.verify.ports.table import Table
from vit_ref.verify.tapped import Tapped
from vit_ref.verify.trace import Forward, precision_of


class JaxPort(Tapped):
    """A candidate of any kind but PyTorch's.

    Args:
      candidate: the declaration.
      config: the checkpoint's configuration.
      checkpoint: the path that its loader is given.
      port: what the loader returned for float64, where it was asked already.

    Raises:
      CandidateError: its table does not fit the configuration.
    """

    def __init__(self, candidate: Candidate, config: ViTConfig, checkpoint: Path, port: Any = None):
        self.name = candidate.name
        self.config = config
        self.claims = claims(candidate, config)
        # From the images' shape to what observes the port; a proposal puts one in its place that asks for everything.
        self.tables: Callable[[tuple[int, ...]], Table] = lambda images: Table(candidate.sites, config, images, _vjp)
        self._candidate = candidate
        self._checkpoint = checkpoint
        # The last one loaded, and its dtype: reading a checkpoint takes seconds.
        self._port = None if port is None else (np.dtype(np.float64), port)

    def ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        """See `Tapped.ready`."""
        candidate = self._candidate
        if self._port is None or self._port[0] != np.dtype(dtype):
            self._port = np.dtype(dtype), loaded(candidate, self._checkpoint, dtype)
        parameters, run = adapted(self._port[1], candidate.call, self.name)
        if np.dtype(dtype) == np.float64:
            parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if is_float(x) else x, parameters)

        def forward(parameters: Any, pixels: jax.Array, tap: Tap) -> jax.Array:
            table = self.tables(pixels.shape)
            images = pixels.transpose(0, 3, 1, 2) if candidate.channels_first else pixels
            with unrounded_softmax(dtype):
                output = observed(candidate, self.config, partial(run, parameters, images), table, tap)
            if tap is not identity:
                self.fixed = frozenset(table.fixed)
            return output

        return parameters, forward

    def by_path(self, gradients: Any) -> dict[str, NDArray]:
        """See `Tapped.by_path`."""
        return recognised(self._candidate, self.config, _leaves(gradients))

    def parameters(self) -> dict[str, NDArray]:
        """The port's parameters in float64, on the host, by its own paths."""
        with precision_of(np.float64):
            return _leaves(self.ready(np.float64)[0])


def _leaves(tree: Any) -> dict[str, NDArray]:
    if isinstance(tree, nnx.State):
        return parameters_of_state(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@contextlib.contextmanager
def unrounded_softmax(dtype: DTypeLike) -> Iterator[None]:
    """In float64, fused attention without its rounding of the softmax to float32.

    `jax.nn.dot_product_attention`, which nnx's attention calls, rounds whatever its inputs are. That is its precision
    and not its formula; the numerical gate judges it, untouched, in the tested precision. It is replaced in every
    module that has it, under whatever name a port imported it.
    """
    if np.dtype(dtype) != np.float64:
        yield
        return
    fused = jax.nn.dot_product_attention

    def exact(query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, **options: Any) -> Any:
        if not all(options.get(name) is None or options[name] is False for name in _OTHER_ATTENTION):
            return fused(query, key, value, bias, mask, **options)
        # One image's, as under vmap, are (N, H, K).
        queries, keys, values = (x if x.ndim == 4 else x[None] for x in (query, key, value))
        if queries.shape[2] != keys.shape[2]:
            return fused(query, key, value, bias, mask, **options)
        scale = options.get("scale")
        scores = jnp.einsum("bqhk,bmhk->bhqm", queries, keys)
        scores *= 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum("bhqm,bmhk->bqhk", jax.nn.softmax(scores), values).reshape(query.shape)

    namespaces = [each for each in gc.get_referrers(fused) if isinstance(each, dict)]
    places = [(names, name) for names in namespaces for name, value in list(names.items()) if value is fused]
    for names, name in places:
        names[name] = exact
    try:
        yield
    finally:
        for names, name in places:
            names[name] = fused


# Options of fused attention for which no vision transformer has a use.
_OTHER_ATTENTION = ("is_causal", "query_seq_lengths", "key_value_seq_lengths", "local_window_size", "return_residual")


def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
    picked, pull_back = jax.vjp(function, value)
    return picked, lambda cotangent: pull_back(cotangent)[0]
