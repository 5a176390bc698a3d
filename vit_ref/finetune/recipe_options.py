"""Options of the command line for the fields of `Recipe`, which alone holds their names, types and defaults.

A new option that decides the result is a field of `Recipe` and a line of `_HELP`. One that does not is in
`cli/finetune.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from vit_ref.finetune.recipe import Recipe

_HELP = {
    "epochs": "Passes over the training images.",
    "batch_size": "Images in a step, over all devices and processes.",
    "optimizer": "Optimizer; sgd has Nesterov momentum.",
    "learning_rate": "Highest learning rate.",
    "schedule": "How the learning rate falls to zero.",
    "warmup_ratio": "Part of the run in which the learning rate rises.",
    "momentum": "Nesterov momentum of sgd.",
    "weight_decay": "Weight decay of the kernels.",
    "layer_decay": "Learning rate of a block, divided by that of the block above it.",
    "freeze_blocks": "Number of lowest blocks to freeze; -1 freezes all but the head.",
    "grad_accum_steps": "Steps whose mean gradient makes one update.",
    "grad_clip": "Largest global norm of the gradient. Default: no limit.",
    "label_smoothing": "Part of a label's weight that all classes share.",
    "dropout": "Dropout rate. Default: that of the checkpoint.",
    "precision": "mixed computes the blocks in bfloat16, the rest in float32.",
    "attention": "cudnn is fused; it needs mixed precision and an NVIDIA GPU.",
    "image_size": "Side in pixels to resize images and position embeddings to. Default: that of the checkpoint.",
    "head": "fresh starts a new head; keep takes the checkpoint's.",
    "augment": "Crop, flip and jitter the training images.",
    "seed": "Seed of the head, the order, the augmentation and the dropout.",
}


def add_recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each field of `Recipe` to a command. An option that the caller omits is None."""
    hints = get_type_hints(Recipe)
    for field in reversed(dataclasses.fields(Recipe)):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        kinds = [kind for kind in get_args(hint) if kind is not type(None)] if get_origin(hint) is not Literal else []
        default = ("" if field.default else "no-") + name if hint is bool else field.default
        described = _HELP[field.name] + ("" if default is None else f" [default: {default}]")
        if hint is bool:
            option = click.option(f"--{name}/--no-{name}", default=None, help=described)
        elif get_origin(hint) is Literal:
            option = click.option(f"--{name}", type=click.Choice(get_args(hint)), help=described)
        else:
            option = click.option(f"--{name}", type=kinds[0] if kinds else hint, help=described)
        command = option(command)
    return command


def make_recipe(given: dict[str, Any]) -> Recipe:
    """Returns a recipe from the given options, with the defaults for those that are None."""
    return Recipe(**{name: value for name, value in given.items() if value is not None})
