"""The command `vit-ref verify`: prints the verdict on a candidate."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import click

from vit_ref import image_files
from vit_ref.cli.console import PrintedReport, say_left_out, show_progress
from vit_ref.cli.embedded import open_checkpoint
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.memory import keep_freed_memory
from vit_ref.cli.options import LOCAL, cache_option, fail_fast_option, ignore_option, json_option
from vit_ref.cli.outputs import STDOUT, require_outputs, write_json, write_output
from vit_ref.errors import InputError, PartlyJudgedError
from vit_ref.verify.candidates.spec import split_spec

WRONG = 1
# The keys of `precision.PRECISIONS`, whose module imports jax. A test compares the two.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "mixed", "float16")


@click.command()
@click.argument("checkpoint", required=False)
@click.option(
    "--candidate", "candidates", multiple=True, metavar="FILE.py|module:attr", help="Candidate to test; repeatable."
)
@click.option(
    "--reference",
    type=click.Choice(["flax", "torch", "numpy"]),
    default="flax",
    show_default=True,
    help="Reference: FlaxViT, transformers' ViT in PyTorch, or the NumPy oracle.",
)
@click.option(
    "--precision",
    "--dtype",
    "precision",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Precision of the numerical gate.",
)
@click.option("--images", type=LOCAL, metavar="DIR", help="Directory of photographs. Default: synthetic images.")
@ignore_option
@click.option("--forward-only", is_flag=True, help="Skip the gradients.")
@fail_fast_option
@click.option(
    "--quick",
    is_flag=True,
    help="Verify a cut of the checkpoint only: first and last block, small images. Exit code 0 is no full verdict.",
)
@click.option(
    "--stream", is_flag=True, help="Hold one block in memory at a time. It cannot be combined with --candidate."
)
@click.option("--table", "whole", is_flag=True, help="Print the errors of every site.")
@click.option("--html", type=LOCAL, metavar="FILE", help="Write the report as one page; - prints it.")
@json_option
@cache_option
@click.pass_context
def verify(
    ctx: click.Context,
    checkpoint: str | None,
    candidates: tuple[str, ...],
    reference: str,
    precision: str,
    images: Path | None,
    ignore: tuple[str, ...],
    forward_only: bool,
    fail_fast: bool,
    quick: bool,
    stream: bool,
    whole: bool,
    html: Path | None,
    json_file: Path | None,
    cache: bool,
) -> None:
    """Verify each --candidate on CHECKPOINT, a directory, file or hub id.

    Without --candidate the command verifies this package's model. Without CHECKPOINT it uses a small embedded case,
    which takes half a minute on two cores. It compares every value of the forward pass and every gradient with a
    float64 oracle.

    The verdict on the forward pass is printed before the gradients begin, and theirs before the behaviour. On a
    terminal the command tells a first divergence before it looks for the cause.

    Exit code 0: every check passed. 1: a check failed, and the report names the first divergence. 2: some input cannot
    be used; if the forward pass was verified first, the command prints its results.
    """
    if len(candidates) > 1 and (html or json_file):
        raise InputError(f"--html and --json hold one report, and there are {len(candidates)} candidates: give one")
    if stream and candidates:
        raise InputError("--stream verifies only this package's model: leave out --candidate or --stream")
    if stream and quick:
        raise InputError("--stream verifies every block and --quick two: give one of the two")
    if checkpoint is None:
        for option, given in (("ignore", ignore), ("images", images), ("quick", quick), ("stream", stream)):
            if given:
                raise InputError(f"--{option} needs a CHECKPOINT, and there is none: give one, or leave out --{option}")
    require_outputs(html=html, json=json_file)
    for spec in candidates:
        split_spec(spec)
    keep_freed_memory()
    with leave_when_interrupted():
        from vit_ref.verify.report import to_html, to_json
        from vit_ref.verify.session import check_port, count_steps
        from vit_ref.verify.stream import check_streamed

    if images is not None:
        say_left_out(image_files.find(images).others)
    aside = STDOUT in (html, json_file)
    passed, unjudged = True, None
    with open_checkpoint(checkpoint) as place:
        for candidate in candidates or (None,):
            heading = f"candidate {candidate}:" if len(candidates) > 1 else ""
            printed = PrintedReport(stderr=aside, whole=whole, heading=heading)
            with show_progress(None if stream else count_steps(backward=not forward_only)) as progress:
                checked = partial(check_port, candidate, quick=quick, on_divergence=progress.say)
                check = check_streamed if stream else checked
                try:
                    report = check(
                        place,
                        images=images,
                        ignore=ignore,
                        precision=precision,
                        reference=reference,
                        backward=not forward_only,
                        cache=cache,
                        fail_fast=fail_fast,
                        on_part=partial(printed.show, steps=progress),
                        progress=progress,
                    )
                except PartlyJudgedError as error:
                    report, unjudged = error.report, error
            if checkpoint is None:
                # The temporary directory no longer exists when a person reads the report.
                report = dataclasses.replace(report, checkpoint=report.checkpoint._replace(path=""))
            if json_file:
                write_json(json_file, to_json(report))
            if html:
                write_output(html, to_html(report))
            printed.end(report)
            passed &= report.passed
    if passed and unjudged:
        raise unjudged
    ctx.exit(0 if passed else WRONG)
