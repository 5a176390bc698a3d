"""One training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from vit_ref.model.vit import VisionTransformer


def classification_loss(
    model: VisionTransformer,
    pixels: Array,
    labels: Array,
    rngs: nnx.Rngs | None = None,
    label_smoothing: float = 0.0,
) -> Array:
    """Returns the mean cross-entropy over the batch, computed in at least float32, whatever the model's dtype.

    Args:
      model: a model with a head. In training mode its dropout is active.
      pixels: preprocessed images (B, height, width, C).
      labels: class ids (B,), integers.
      rngs: the "dropout" stream, needed in training mode.
      label_smoothing: part of a label's weight that all classes share (Szegedy et al. 2016,
        https://arxiv.org/abs/1512.00567).

    Returns:
      A scalar, float32 or float64. bfloat16 would quantise it to 8 bits, and its gradient with it.
    """
    logits = model(pixels, rngs=rngs)
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        # The loss against the uniform distribution is the mean of the losses against every class.
        uniform = -jax.nn.log_softmax(logits).mean(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return loss.mean()


def train_step(
    model: VisionTransformer,
    optimizer: nnx.Optimizer,
    pixels: Array,
    labels: Array,
    rngs: nnx.Rngs | None = None,
    label_smoothing: float = 0.0,
) -> Array:
    """Updates `model` and `optimizer` in place by one step. Wrap it in `nnx.jit`.

    Args:
      model: a model with a head. In training mode its dropout is active.
      optimizer: `nnx.Optimizer(model, transformation, wrt=filter)`. Parameters that `wrt` leaves out are frozen, and
        their gradients are not computed.
      pixels: preprocessed images (B, height, width, C).
      labels: class ids (B,), integers.
      rngs: the "dropout" stream, needed in training mode.
      label_smoothing: part of a label's weight that all classes share.

    Returns:
      The loss before the update, a scalar.
    """
    differentiated = nnx.DiffState(0, optimizer.wrt)
    loss, gradients = nnx.value_and_grad(classification_loss, argnums=differentiated)(
        model, pixels, labels, rngs, label_smoothing
    )
    optimizer.update(model, gradients)
    return loss


def split_step(
    graph: nnx.GraphDef,
    state: nnx.State,
    pixels: Array,
    labels: Array,
    rngs: nnx.Rngs | None = None,
    label_smoothing: float = 0.0,
) -> tuple[nnx.State, Array]:
    """Makes one training step as a function of arrays, for `jax.jit`. Model and optimizer are split only once.

    Args:
      graph: the graph from `nnx.split((model, optimizer))`.
      state: the state from the same split, or from the step before.
      pixels: preprocessed images (B, height, width, C).
      labels: class ids (B,), integers.
      rngs: the "dropout" stream, needed in training mode.
      label_smoothing: part of a label's weight that all classes share.

    Returns:
      The state after the update, and the loss before it.
    """
    model, optimizer = nnx.merge(graph, state)
    loss = train_step(model, optimizer, pixels, labels, rngs, label_smoothing)
    return nnx.state((model, optimizer)), loss
