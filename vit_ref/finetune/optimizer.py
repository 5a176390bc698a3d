"""The optimizer of a recipe, in optax's terms."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from vit_ref.errors import InputError
from vit_ref.finetune.recipe import Recipe


def make_schedule(recipe: Recipe, updates: int) -> optax.Schedule:
    """The learning rate by update: a linear rise, then the recipe's fall, which is at zero once the last one is made.

    So every update moves: of a rise over r updates the first has 1 / (r + 1) of the peak, of a linear fall over f the
    last has 1 / f of it.

    Args:
      recipe: how to train.
      updates: of the whole run.
    """
    peak, rise = recipe.learning_rate, round(recipe.warmup_ratio * updates)
    rest = max(updates - rise, 1)
    fall = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[recipe.schedule]
    if not rise:
        return fall
    # From a first step of its own, not from zero, at which the first update would be none.
    return optax.join_schedules([optax.linear_schedule(peak / (rise + 1), peak, rise), fall], [rise])


def make_transformation(recipe: Recipe, updates: int, blocks: int) -> optax.GradientTransformation:
    """Clipping, the optimizer, its schedule and the decay by layer.

    Args:
      recipe: how to train.
      updates: of the whole run.
      blocks: of the model.
    """
    rate = make_schedule(recipe, updates)
    parts = [] if recipe.grad_clip is None else [optax.clip_by_global_norm(recipe.grad_clip)]
    if recipe.optimizer == "adamw":
        parts.append(optax.adamw(rate, weight_decay=recipe.weight_decay, mask=select_kernels))
    else:
        if recipe.weight_decay:
            parts.append(optax.add_decayed_weights(recipe.weight_decay, select_kernels))
        parts.append(optax.sgd(rate, momentum=recipe.momentum, nesterov=True))
    if recipe.layer_decay != 1:
        parts.append(_by_layer(recipe.layer_decay, blocks))
    chained = optax.chain(*parts)
    if recipe.grad_accum_steps == 1:
        return chained
    return optax.MultiSteps(chained, recipe.grad_accum_steps).gradient_transformation()


def select_trained(recipe: Recipe, blocks: int) -> Any:
    """The filter for `nnx.Optimizer`'s `wrt`: the parameters that the recipe trains.

    Raises:
      InputError: more blocks are frozen than there are.
    """
    if recipe.freeze_blocks > blocks:
        raise InputError(
            f"freeze_blocks is {recipe.freeze_blocks}: the model has {blocks} blocks; -1 trains the head alone"
        )
    if recipe.freeze_blocks == 0:
        return nnx.Param
    lowest = blocks + 2 if recipe.freeze_blocks == -1 else recipe.freeze_blocks + 1
    return nnx.All(nnx.Param, lambda path, value: find_layer(path, blocks) >= lowest)


def find_layer(path: tuple[Any, ...], blocks: int) -> int:
    """Where in the model a parameter is: 0 the embeddings, 1 the first block, then the last norm, then the head."""
    if path[0] == "blocks":
        return int(path[1]) + 1
    return {"norm": blocks + 1, "head": blocks + 2}.get(path[0], 0)


def select_kernels(parameters: Any) -> Any:
    """Which parameters decay: kernels. Biases, norms, cls token and positions would be drawn to zero for nothing."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in _names(path), parameters)


def _by_layer(decay: float, blocks: int) -> optax.GradientTransformation:
    def scaled(updates: Any, parameters: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(
            # Norm and head are of one height.
            lambda path, u: u * decay ** max(blocks + 1 - find_layer(_names(path), blocks), 0),
            updates,
        )

    return optax.stateless(scaled)


def _names(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
