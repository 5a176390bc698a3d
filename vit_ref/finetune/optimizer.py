"""The optimizer of a recipe, as an optax transformation."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from vit_ref.errors import InputError
from vit_ref.finetune.recipe import Recipe


def make_schedule(recipe: Recipe, updates: int) -> optax.Schedule:
    """Returns the learning rate by update: a linear rise, then the fall of the recipe's schedule.

    The rate is zero only after the last update, so every update changes the parameters. The first of r updates of the
    rise has 1 / (r + 1) of the highest rate. The last of f updates of a linear fall has 1 / f of it.

    Args:
      recipe: the recipe of the run.
      updates: number of updates in the whole run.
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
    # The rise does not start at zero, because the first update would then change nothing.
    return optax.join_schedules([optax.linear_schedule(peak / (rise + 1), peak, rise), fall], [rise])


def make_transformation(recipe: Recipe, updates: int, blocks: int) -> optax.GradientTransformation:
    """Returns the chain of clipping, the optimizer with its schedule, and the decay by layer.

    Args:
      recipe: the recipe of the run.
      updates: number of updates in the whole run.
      blocks: number of blocks in the model.
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
    """Returns the filter for `wrt` of `nnx.Optimizer`: the parameters that the recipe trains.

    Args:
      recipe: the recipe of the run.
      blocks: number of blocks in the model.

    Raises:
      InputError: the recipe freezes more blocks than the model has.
    """
    if recipe.freeze_blocks > blocks:
        raise InputError(
            f"freeze_blocks is {recipe.freeze_blocks}: the model has {blocks} blocks: give at most that, or -1 to train"
            " only the head"
        )
    if recipe.freeze_blocks == 0:
        return nnx.Param
    lowest = blocks + 2 if recipe.freeze_blocks == -1 else recipe.freeze_blocks + 1
    return nnx.All(nnx.Param, lambda path, value: find_layer(path, blocks) >= lowest)


def find_layer(path: tuple[Any, ...], blocks: int) -> int:
    """Returns the layer of a parameter: 0 for the embeddings, then the blocks, the last norm, and the head."""
    if path[0] == "blocks":
        return int(path[1]) + 1
    return {"norm": blocks + 1, "head": blocks + 2}.get(path[0], 0)


def select_kernels(parameters: Any) -> Any:
    """Returns a tree that is True for parameters with weight decay: the kernels.

    Decay would only pull biases, norms, cls token and positions to zero.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in _names(path), parameters)


def _by_layer(decay: float, blocks: int) -> optax.GradientTransformation:
    def scaled(updates: Any, parameters: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(
            # Norm and head count as one layer.
            lambda path, u: u * decay ** max(blocks + 1 - find_layer(_names(path), blocks), 0),
            updates,
        )

    return optax.stateless(scaled)


def _names(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
