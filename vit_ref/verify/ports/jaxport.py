"""A declared candidate that runs in JAX, as the engine judges it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

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
            looking = tap is not identity
            table = self.tables(pixels.shape) if looking else Table({}, self.config, pixels.shape, _vjp)
            images = pixels.transpose(0, 3, 1, 2) if candidate.channels_first else pixels
            with unrounded_softmax(dtype):
                output = observed(candidate, self.config, partial(run, parameters, images), table, tap)
            if looking:
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
    and not its formula; the numerical gate judges it, untouched, in the tested precision. What it calls is replaced and
    not the function, which ports have under any name, as a default or an attribute.
    """
    inside = jax.nn.dot_product_attention.__globals__
    fused: Any = inside.get(_FUSED)
    cudnn: Any = inside.get(_CUDNN)
    if np.dtype(dtype) != np.float64 or fused is None:
        yield
        return

    def exact(query: Any, key: Any, value: Any, bias: Any, mask: Any, *, scale: Any, **options: Any) -> Any:
        used = any(option is not None and option is not False for option in options.values())
        if used or query.shape[2] != key.shape[2]:
            return fused(query, key, value, bias, mask, scale=scale, **options)
        scores = scale * jnp.einsum("bqhk,bmhk->bhqm", query, key)
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum("bhqm,bmhk->bqhk", jax.nn.softmax(scores), value)

    def on_gpu(
        query: Any, key: Any, value: Any, bias: Any, mask: Any, *lengths: Any, mask_type: Any, **options: Any
    ) -> Any:
        if mask_type.name != "NO_MASK":
            return cudnn(query, key, value, bias, mask, *lengths, mask_type=mask_type, **options)
        return exact(query, key, value, bias, mask, **options)

    # cuDNN's has no float64 at all.
    with mock.patch.dict(inside, {_FUSED: exact, **({_CUDNN: on_gpu} if cudnn else {})}):
        yield


# What computes it on (B, N, H, K), with options, such as a causal mask, for which no vision transformer has a use. Not
# public: a test holds that it is there.
_FUSED = "_dot_product_attention_xla"
_CUDNN = "cudnn_dot_product_attention"


def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
    picked, pull_back = jax.vjp(function, value)
    return picked, lambda cotangent: pull_back(cotangent)[0]
