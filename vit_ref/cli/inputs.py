"""The options that say what a declared reference and a candidate compute on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_ref.cli.options import LOCAL
from vit_ref.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class _Shape(click.ParamType):
    """A name and a shape: NAME=2,3,4."""

    name = "NAME=N,N,..."

    def convert(
        self, value: str, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        name, _, sizes = value.partition("=")
        if not name or not sizes or not all(size.isdecimal() and int(size) for size in sizes.split(",")):
            raise InputError(f"--shape {value}: give a name and sizes of at least 1, as pixel_values=2,3,30,42")
        return name, tuple(map(int, sizes.split(",")))


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --inputs, --shape and --seed to a command."""
    for option in (
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of inputs that are made."
        ),
        click.option(
            "--shape", "shapes", type=_Shape(), multiple=True, help="Use a random input of this shape. Repeatable."
        ),
        click.option(
            "--inputs",
            type=LOCAL,
            metavar="FILE.npz",
            help="Arrays by name. Default: the reference's inputs(seed).",
        ),
    ):
        command = option(command)
    return command


def require_one_source(inputs: Path | None, shapes: Shapes) -> None:
    """Checks that the options agree on what makes the inputs.

    Args:
      inputs: the value of --inputs.
      shapes: the values of --shape.

    Raises:
      InputError: both are given, or a name is given twice.
    """
    if inputs and shapes:
        raise InputError("--inputs and --shape both make the inputs: give one of the two")
    if len(dict(shapes)) < len(shapes):
        raise InputError(f"--shape names {', '.join(name for name, _ in shapes)}: give each name once")


def make_inputs(inputs: Path | None, shapes: Shapes, seed: int) -> dict[str, NDArray] | Path | None:
    """Returns the argument `inputs` of `compare` and `propose` for the values of the options."""
    from vit_ref.verify.pairs.given import random_inputs

    return random_inputs(dict(shapes), seed) if shapes else inputs
