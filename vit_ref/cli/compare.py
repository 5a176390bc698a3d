"""`vit-ref compare`: compares a candidate with a reference of any kind."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from vit_ref.cli.console import PrintedReport, show_progress
from vit_ref.cli.inputs import Shapes, input_options, make_inputs, require_one_source
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.memory import keep_freed_memory
from vit_ref.cli.options import LOCAL, cache_option, fail_fast_option, json_option
from vit_ref.cli.outputs import STDOUT, require_outputs, write_json, write_output
from vit_ref.cli.verify import WRONG
from vit_ref.errors import PartlyJudgedError
from vit_ref.verify.candidates.spec import split_spec

# Without "mixed", because only this package's own model computes in it.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "float16")


@click.command()
@click.argument("reference", metavar="REFERENCE")
@click.argument("candidate", metavar="CANDIDATE")
@click.option("--checkpoint", type=LOCAL, metavar="PATH", help="Checkpoint that both sides load.")
@input_options
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
    shapes: Shapes,
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
    require_one_source(inputs, shapes)
    require_outputs(html=html, json=json_file)
    split_spec(reference)
    split_spec(candidate)
    keep_freed_memory()
    with leave_when_interrupted():
        from vit_ref.verify.pairs import session
        from vit_ref.verify.report import to_html, to_json

    given = make_inputs(inputs, shapes, seed)
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
                on_divergence=progress.say,
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
