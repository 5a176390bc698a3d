"""Bugs of training: dropout, the loss, the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import Array

from tests.mutants.injection import Inject, Pass, at, instead, layers
from tests.mutants.mutant import Mutant
from vit_ref.finetune import step

# One test that sees the rate and shape of each mask. Masks have shapes, but no sites.
MASKS = ("tests/training/test_dropout.py", "-k", "by_default_each_image_and_head")
FOLLOWS = ("tests/training/test_training_parity.py", "-k", "follow_the_reference and nesterov")


class _Live(nnx.Dropout):
    """Drops values in every mode of the model."""

    def __call__(self, inputs: Array, *, rngs: Any = None, **_: Any) -> Array:
        return super().__call__(inputs, rngs=rngs or nnx.Rngs(dropout=0), deterministic=False)


class _Unscaled(nnx.Dropout):
    """Zeroes values, and does not rescale the rest."""

    def __call__(self, inputs: Array, **options: Any) -> Array:
        kept = super().__call__(inputs, **options)
        return kept if self.deterministic else kept * (1 - self.rate)


class _OneMask(nnx.Dropout):
    """Draws the same mask in every layer and step."""

    def __call__(self, inputs: Array, *, rngs: Any = None, **options: Any) -> Array:
        return super().__call__(inputs, rngs=rngs and nnx.Rngs(dropout=0), **options)


def _dropped_inside(value: Array, here: Pass) -> Array:
    dropout = here.model.dropout
    if dropout.deterministic or here.rngs is None:
        return value
    keep = jax.random.bernoulli(here.rngs.dropout(), 1 - dropout.rate, value.shape)
    return jnp.where(keep, value / (1 - dropout.rate), 0)


def _shared(rate: float, **options: Any) -> nnx.Dropout:
    # Only the dropout of attention has an argument for the axes along which it broadcasts.
    return nnx.Dropout(rate, **{**options, **({"broadcast_dims": (0, 1)} if "broadcast_dims" in options else {})})


def _updated(change: Any) -> Inject:
    """Calls `change(update, optimizer, model, gradients)` instead of an optimizer's update.

    The optimizer is flax's. FlaxViT's training has none, because it calls optax.
    """

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        update = nnx.Optimizer.update
        monkeypatch.setattr(
            nnx.Optimizer, "update", lambda self, model, gradients: change(update, self, model, gradients)
        )

    return inject


def _late(update: Any, optimizer: nnx.Optimizer, model: nnx.Module, gradients: Any) -> None:
    factor = jnp.where(optimizer.step[...] < 2, 1.0, 1 + 1e-4)
    update(optimizer, model, jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients))


def _decaying_all(update: Any, optimizer: nnx.Optimizer, model: nnx.Module, gradients: Any) -> None:
    update(optimizer, model, gradients)
    nnx.update(model, jax.tree.map(lambda p: p * (1 - 1e-4), nnx.state(model, nnx.Param)))


def _smoothed(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 1e-3))


MUTANTS = (
    Mutant(
        number=34,
        name="dropout-in-evaluation",
        story="dropout stays active, because eval() was not called",
        source="equinox #287",
        inject=layers("Dropout", _Live),
        first_site="embeddings",
    ),
    Mutant(
        number=35,
        name="dropout-broadcast",
        story="one mask of attention for all images and heads",
        source="flax's attention has broadcast_dropout=True",
        inject=layers("Dropout", _shared),
        killed_by="training",
        tests=MASKS,
    ),
    Mutant(
        number=49,
        name="dropout-inside-the-mlp",
        story="a dropout between the MLP's linear layers, which the reference lacks",
        source="the NNX tutorial",
        inject=at("block.*.mlp.hidden", _dropped_inside),
        killed_by="training",
        tests=("tests/training/test_dropout.py", "-k", "masks_act_where and independent"),
        first_site="block.0.mlp.hidden",
        says="'{site}'",
    ),
    Mutant(
        name="dropout-rate-for-probability-of-keeping",
        story="with a rate of 0.3, 0.3 of the values are kept",
        source="TensorFlow 1's keep_prob",
        inject=layers("Dropout", lambda rate, **options: nnx.Dropout(1 - rate, **options)),
        killed_by="training",
        tests=MASKS,
    ),
    Mutant(
        name="dropout-not-rescaled",
        story="kept values are not divided by the probability of keeping",
        source="Srivastava et al. (2014) rescale in evaluation instead",
        inject=layers("Dropout", _Unscaled),
        killed_by="training",
        # Its values are compared with the reference's at the logits.
        tests=("tests/training/test_dropout.py", "-k", "references_masks_training"),
    ),
    Mutant(
        name="dropout-the-same-in-every-layer",
        story="every layer draws from the same key",
        source="a key that is used twice, jax's oldest gotcha",
        inject=layers("Dropout", _OneMask),
        killed_by="training",
        # Two seeds give one result: the test compares logits.
        tests=("tests/training/test_dropout.py", "-k", "one_seed and independent"),
    ),
    Mutant(
        name="wrong-after-the-second-step",
        story="from the third step on, gradients are off by one part in 10^4",
        source="bias correction and schedules count from 0 or from 1",
        inject=_updated(_late),
        killed_by="training",
        # Losses are compared first, and the loss comes after the last site.
        tests=FOLLOWS,
    ),
    Mutant(
        name="labels-smoothed",
        story="a label smoothing of 0.001 that the reference lacks",
        source="a default of the training script",
        inject=lambda monkeypatch: instead(
            monkeypatch, step, "optax.softmax_cross_entropy_with_integer_labels", _smoothed
        ),
        killed_by="training",
        # Losses are compared first, and the loss comes after the last site.
        tests=FOLLOWS,
    ),
    Mutant(
        name="frozen-weights-decay",
        story="weight decay changes frozen parameters",
        source="optax's masks and partitions are easily inverted",
        inject=_updated(_decaying_all),
        killed_by="training",
        tests=("tests/training/test_overfit.py", "-k", "frozen_backbone"),
        # All parameters except the head's have changed. The message shows some of them, in no fixed order.
    ),
)
