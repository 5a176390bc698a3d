"""The command `vit-ref convert`: writes a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import LOCAL, ignore_option, json_option
from vit_ref.cli.outputs import print_result, require_outputs

if TYPE_CHECKING:
    from vit_ref.weights.conversion import Target

# The values of `conversion.Target`, whose module imports jax. A test compares the two.
LAYOUTS = ("hf", "flax", "npz", "big_vision", "timm")


@click.command()
@click.argument("source")
@click.argument("destination", type=LOCAL)
@click.option("--to", "layout", type=click.Choice(LAYOUTS), required=True, help="Layout to write.")
@ignore_option
@json_option
def convert(source: str, destination: Path, layout: Target, ignore: tuple[str, ...], json_file: Path | None) -> None:
    """Write the checkpoint SOURCE to DESTINATION in another layout.

    No value changes. The command reads DESTINATION back and compares it with SOURCE.
    """
    require_outputs(json=json_file)
    with leave_when_interrupted():
        from vit_ref.weights import conversion
    done = conversion.convert(source, destination, layout, ignore=ignore)
    print_result(str(done), json_file, done.to_json())
