"""Two ways to train the same weights on the same batches: this package's step, and FlaxViT's module with optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from vit_ref.finetune.step import train_step
from vit_ref.model.config import ViTConfig
from vit_ref.verify.references.flax_vit import FlaxViTReference
from vit_ref.verify.vit import hf_tensors
from vit_ref.weights import layouts, mapping
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.pretrained import build, get_parameters

Batches = list[tuple[NDArray, NDArray]]
Transformation = Callable[[], optax.GradientTransformation]


class Run(NamedTuple):
    """The loss before each step of a training run, and the parameters by path after some steps."""

    losses: NDArray
    parameters: dict[int, dict[str, NDArray]]


def _train_ours(
    config: ViTConfig, source: Checkpoint, make: Transformation, batches: Batches, dtype: DTypeLike, keep: set[int]
) -> Run:
    with precision_of(dtype).active():
        weights = mapping.port(source.tensors, config, mapping.detect(source.tensors))
        model = build(config, {path: value.astype(dtype) for path, value in weights.items()}, dtype=dtype)
        optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
        step = nnx.jit(train_step)
        losses, kept = [], {}
        for number, (pixels, labels) in enumerate(batches, start=1):
            losses.append(step(model, optimizer, jnp.asarray(pixels, dtype), jnp.asarray(labels)))
            if number in keep:
                kept[number] = get_parameters(model)
        return Run(np.array(losses, np.float64), kept)


def _train_flaxvit(
    config: ViTConfig, source: Checkpoint, make: Transformation, batches: Batches, dtype: DTypeLike, keep: set[int]
) -> Run:
    reference = FlaxViTReference(config, hf_tensors(config, source))
    transformation = make()
    with precision_of(dtype).active():
        module = reference.module(dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), reference.params)
        state = transformation.init(params)

        def loss_of(params, pixels, labels):  # noqa: ANN202
            logits = module.apply({"params": params}, pixels).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @jax.jit
        def step(params, state, pixels, labels):  # noqa: ANN202
            loss, gradients = jax.value_and_grad(loss_of)(params, pixels, labels)
            updates, state = transformation.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        losses, kept = [], {}
        for number, (pixels, labels) in enumerate(batches, start=1):
            params, state, loss = step(params, state, jnp.asarray(pixels, dtype), jnp.asarray(labels))
            losses.append(loss)
            if number in keep:
                tree = flatten_dict(jax.device_get(params), sep="/")
                kept[number] = mapping.port(tree, config, layouts.FLAX)
        return Run(np.array(losses, np.float64), kept)


@pytest.fixture(scope="session")
def train_ours() -> Callable[..., Run]:
    """`train_ours(config, source, make_transformation, batches, dtype, keep)` with this package's step."""
    return _train_ours


@pytest.fixture(scope="session")
def train_flaxvit() -> Callable[..., Run]:
    """`train_flaxvit(config, source, make_transformation, batches, dtype, keep)` with FlaxViT's module and optax."""
    return _train_flaxvit
