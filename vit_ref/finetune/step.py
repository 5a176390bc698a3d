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
    """Mean cross-entropy over the batch, computed in at least float32 whatever the model's dtype.

    Args:
      model: a model with a head; in training mode its dropout is live.
      pixels: (B, height, width, C).
      labels: class ids (B,), integers.
      rngs: the "dropout" stream, in training mode.
      label_smoothing: part of a label's weight that all classes share (Szegedy et al. 2016,
        https://arxiv.org/abs/1512.00567).

    Returns:
      A scalar. In bfloat16 it would be quantised to 8 bits, and its gradient with it.
    """
    logits = model(pixels, rngs=rngs)
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        # Against the uniform distribution, which is the mean of the losses against every class.
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
    """Updates `model` and `optimizer` in place by one step; wrap it in `nnx.jit`.

    Args:
      model: see `classification_loss`.
      optimizer: `nnx.Optimizer(model, transformation, wrt=filter)`. Parameters that `wrt` leaves out are frozen: their
        gradients are not even computed.
      pixels: see `classification_loss`.
      labels: see `classification_loss`.
      rngs: see `classification_loss`.
      label_smoothing: see `classification_loss`.

    Returns:
      The loss before the update.
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
    """`train_step` as a function of arrays, for `jax.jit`: model and optimizer are split once and not at every step.

    Args:
      graph: of `nnx.split((model, optimizer))`.
      state: of the same, or from the step before.
      pixels: see `classification_loss`.
      labels: see `classification_loss`.
      rngs: see `classification_loss`.
      label_smoothing: see `classification_loss`.

    Returns:
      The state after the update, and the loss before it.
    """
    model, optimizer = nnx.merge(graph, state)
    loss = train_step(model, optimizer, pixels, labels, rngs, label_smoothing)
    return nnx.state((model, optimizer)), loss
