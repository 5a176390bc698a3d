"""The command `vit-ref env`: prints the packages and devices that a verdict depends on."""

from __future__ import annotations

from pathlib import Path

import click

from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import json_option
from vit_ref.cli.outputs import print_result, require_outputs


@click.command()
@json_option
def env(json_file: Path | None) -> None:
    """Print the versions of packages, the devices and the precision of matrix products."""
    require_outputs(json=json_file)
    with leave_when_interrupted():
        from vit_ref.verify.environment import environment
    stack = environment()
    print_result("\n".join(f"{name} {value}" for name, value in stack.items()), json_file, stack)
