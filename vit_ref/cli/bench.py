"""The command `vit-ref bench`: times the model beside other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vit_ref.cli.console import Output, say
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import LOCAL, json_option
from vit_ref.cli.outputs import STDOUT, require_outputs, write_json
from vit_ref.extras import extra

if TYPE_CHECKING:
    from vit_ref.bench.measure import Timing


@click.command()
@click.option(
    "--size", "sizes", multiple=True, metavar="SIZE", help="Size of the model, such as Ti/16 or B/16; repeatable."
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Images in a batch; repeatable.")
@click.option("--precision", "precisions", multiple=True, help="float32, tensorfloat32, mixed or float16; repeatable.")
@click.option("--pass", "passes", multiple=True, help="Pass to time, forward or train; repeatable. Default: both.")
@click.option("--implementation", "names", multiple=True, help="An installed implementation; repeatable. Default: all.")
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Times to measure each one.")
@click.option("--plot", "picture", type=LOCAL, metavar="FILE", help="Draw the throughput as a PNG file.")
@json_option
def bench(
    sizes: tuple[str, ...],
    batches: tuple[int, ...],
    precisions: tuple[str, ...],
    passes: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int,
    picture: Path | None,
    json_file: Path | None,
) -> None:
    """Time the forward pass and the training step beside FlaxViT, and beside PyTorch if it is installed.

    The implementations take turns, so that a change of the machine's speed meets all of them. Without options the
    command chooses work that takes two CPU cores a minute, or that fills an accelerator.
    """
    require_outputs(plot=picture, json=json_file)
    with leave_when_interrupted():
        from vit_ref.bench.report import plot, table
        from vit_ref.bench.session import time_workloads
        from vit_ref.verify.environment import environment

    console = Output(stderr=json_file == STDOUT, soft_wrap=False)
    timings: list[Timing] = []
    if picture:
        extra("matplotlib.figure", "a plot of throughput")
    try:
        for group in time_workloads(sizes, batches, precisions, passes, names, rounds, say):
            console.print(table(group))
            console.print()
            timings += group
    finally:
        # An interrupt, or a batch that does not fit, must not lose the timings before it.
        if timings and json_file:
            write_json(json_file, {"environment": environment(), "timings": [timing.to_json() for timing in timings]})
        if timings and picture:
            plot(picture, timings)
