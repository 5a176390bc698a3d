"""A model with a batch, in any dtype, and a loss, for all questions of consistency."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES
from vit_ref.weights.layouts import HF
from vit_ref.weights.mapping import port
from vit_ref.weights.pretrained import build


class Example(NamedTuple):
    """A model and the arguments of its loss: pixels, class ids, and the key of its dropout."""

    model: VisionTransformer
    pixels: Array
    labels: Array
    key: Array


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    """`example(dtype, seed=0, training=False)`: an example with float32 parameters, or float64 if `dtype` is that."""

    def make(dtype: DTypeLike = jnp.float32, seed: int = 0, *, training: bool = False) -> Example:
        case = dataclasses.replace(CASES["rectangular"], batch=3, seed=seed)
        # Names of classes do not change what is computed, so they may not change what is compiled.
        named = dataclasses.replace(case.config, labels=tuple(f"{seed}-{i}" for i in range(case.config.num_labels)))
        stored = np.float64 if dtype == jnp.float64 else np.float32
        parameters = port(case.checkpoint().tensors, case.config, HF)
        model = build(named, {path: value.astype(stored) for path, value in parameters.items()}, dtype=dtype)
        model.train() if training else model.eval()
        labels = np.random.default_rng(seed).integers(case.config.num_labels, size=case.batch)
        return Example(
            model, jnp.asarray(case.images(), dtype), jnp.asarray(labels, jnp.int32), jax.random.key(seed + 1)
        )

    return make


@pytest.fixture(scope="session")
def cross_entropy() -> Callable[..., tuple[Array, Array]]:
    """`cross_entropy(model, pixels, labels, key) -> (loss, logits)`."""

    def loss(model: VisionTransformer, pixels: Array, labels: Array, key: Array) -> tuple[Array, Array]:
        logits = model(pixels, rngs=nnx.Rngs(dropout=key))
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(wide), labels[:, None], axis=-1)
        return -chosen.mean(), logits

    return loss
