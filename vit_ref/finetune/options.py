"""The recipe's fields as options of the command line: names, types and defaults stand in `Recipe` alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from vit_ref.finetune.recipe import Recipe

_HELP = {
    "epochs": "Passes over the training images.",
    "batch_size": "Images a step, over all devices and processes.",
    "learning_rate": "At its highest.",
    "schedule": "How the rate falls to zero.",
    "warmup_ratio": "Part of the run over which the rate rises.",
    "momentum": "Nesterov's, of sgd.",
    "weight_decay": "Of kernels alone.",
    "layer_decay": "Rate of a block over that of the block above it.",
    "freeze_blocks": "Blocks from below that are not trained; -1: all but the head.",
    "grad_accum_steps": "Steps whose gradients make one update.",
    "grad_clip": "Largest norm of the gradient.",
    "label_smoothing": "Part of a label's weight that all classes share.",
    "dropout": "Instead of the checkpoint's own.",
    "precision": "mixed: blocks in bfloat16, the rest in float32.",
    "attention": "cudnn: fused, in mixed precision on NVIDIA's GPUs.",
    "image_size": "Side to resize images and position embeddings to.",
    "head": "A new one, or the checkpoint's.",
    "augment": "Crop, flip and jitter the training images.",
    "seed": "Of head, order, augmentation and dropout.",
}


def add_recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each field of `Recipe`; one that is not given is None, which is no recipe's default."""
    hints = get_type_hints(Recipe)
    for field in reversed(dataclasses.fields(Recipe)):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        kinds = [kind for kind in get_args(hint) if kind is not type(None)] if get_origin(hint) is not Literal else []
        described = f"{_HELP.get(field.name, '')} [default: {field.default}]".strip()
        if hint is bool:
            option = click.option(f"--{name}/--no-{name}", default=None, help=described)
        elif get_origin(hint) is Literal:
            option = click.option(f"--{name}", type=click.Choice(get_args(hint)), help=described)
        else:
            option = click.option(f"--{name}", type=kinds[0] if kinds else hint, help=described)
        command = option(command)
    return command


def make_recipe(given: dict[str, Any]) -> Recipe:
    """The recipe of the options that were given, defaults for the rest."""
    return Recipe(**{name: value for name, value in given.items() if value is not None})
