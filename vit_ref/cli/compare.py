"""`vit-ref compare`: compares a candidate with a reference of any kind."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from vit_ref.cli.console import PrintedReport, show_progress
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.memory import keep_freed_memory
from vit_ref.cli.options import LOCAL, cache_option, fail_fast_option, json_option
from vit_ref.cli.outputs import STDOUT, require_outputs, write_json, write_output
from vit_ref.cli.verify import WRONG
from vit_ref.errors import InputError, PartlyJudgedError

# Without "mixed", because only this package's own model computes in it.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "float16")


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


@click.command()
@click.argument("reference", metavar="REFERENCE")
@click.argument("candidate", metavar="CANDIDATE")
@click.option("--checkpoint", type=LOCAL, metavar="PATH", help="Checkpoint that both sides load.")
@click.option(
    "--inputs",
    type=LOCAL,
    metavar="FILE.npz",
    help="Arrays by name. Default: the reference's inputs(seed).",
)
@click.option("--shape", "shapes", type=_Shape(), multiple=True, help="Use a random input of this shape. Repeatable.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of inputs that are made.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Precision of the numerical gate.",
)
@click.option("--forward-only", is_flag=True, help="Compare no gradients.")
@fail_fast_option
@click.option("--table", "whole", is_flag=True, help="Print every site's errors.")
@click.option("--html", type=LOCAL, metavar="FILE", help="Write the report as one page; - prints it.")
@json_option
@cache_option
@click.pass_context
def compare(
    ctx: click.Context,
    reference: str,
    candidate: str,
    checkpoint: Path | None,
    inputs: Path | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    seed: int,
    precision: str,
    forward_only: bool,
    fail_fast: bool,
    whole: bool,
    html: Path | None,
    json_file: Path | None,
    cache: bool,
) -> None:
    """Compare CANDIDATE with REFERENCE, two implementations of the same model.

    Each is a FILE.py or module:attr that declares how it is loaded: in PyTorch, Flax NNX, linen, equinox or plain JAX.
    The candidate's table says which of its values is which of the reference's.

    Exit code 0: they agree. 1: they do not, and the first divergence is printed. 2: something that was given cannot be
    used.
    """
    if inputs and shapes:
        raise InputError("--inputs and --shape both make the inputs: give one of the two")
    if len(dict(shapes)) < len(shapes):
        raise InputError(f"--shape names {', '.join(name for name, _ in shapes)}: give each name once")
    require_outputs(html=html, json=json_file)
    keep_freed_memory()
    with leave_when_interrupted():
        from vit_ref.verify.pairs import session
        from vit_ref.verify.pairs.given import random_inputs
        from vit_ref.verify.report import to_html, to_json

    given = random_inputs(dict(shapes), seed) if shapes else inputs
    unjudged = None
    printed = PrintedReport(stderr=STDOUT in (html, json_file), whole=whole)
    with show_progress(session.count_steps(backward=not forward_only)) as progress:
        try:
            report = session.compare(
                reference,
                candidate,
                checkpoint,
                inputs=given,
                precision=precision,
                backward=not forward_only,
                seed=seed,
                cache=cache,
                fail_fast=fail_fast,
                on_part=partial(printed.show, steps=progress),
                progress=progress,
            )
        except PartlyJudgedError as error:
            report, unjudged = error.report, error
    if html:
        write_output(html, to_html(report))
    if json_file:
        write_json(json_file, to_json(report))
    printed.end(report)
    if report.passed and unjudged:
        raise unjudged
    ctx.exit(0 if report.passed else WRONG)
