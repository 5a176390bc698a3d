"""`vit-ref verify`: the verdict on a candidate."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from vit_ref import image_files
from vit_ref.cli.console import THEME, Output, Verdicts, say_left_out, show_progress
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import LOCAL, ignore_option, json_option
from vit_ref.cli.outputs import STDOUT, require_outputs, write_json, write_output
from vit_ref.errors import InputError, PartlyJudgedError

WRONG = 1
# Those of `precision.PRECISIONS`, which imports jax. A test compares the two.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16", "mixed", "float16")
# The embedded case that is judged without a checkpoint: rectangular images, and odd sizes of everything.
CASE = "rectangular"


@click.command()
@click.argument("checkpoint", required=False)
@click.option(
    "--candidate", "candidates", multiple=True, metavar="FILE.py|module:attr", help="Candidate to judge; repeatable."
)
@click.option("--reference", type=click.Choice(["flax", "torch", "numpy"]), default="flax", show_default=True)
@click.option(
    "--precision",
    "--dtype",
    "precision",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="What the numerical gate judges.",
)
@click.option("--images", type=LOCAL, metavar="DIR", help="Photographs; else synthetic images.")
@ignore_option
@click.option("--forward-only", is_flag=True, help="No gradients.")
@click.option("--stream", is_flag=True, help="Hold one block at a time, however deep the model. Not with --candidate.")
@click.option("--table", "whole", is_flag=True, help="Print every site's errors.")
@click.option("--html", type=LOCAL, metavar="FILE", help="Write the report as one page; - prints it.")
@json_option
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
    stream: bool,
    whole: bool,
    html: Path | None,
    json_file: Path | None,
) -> None:
    """Judge this package's model on CHECKPOINT, a directory, file or hub id, or each --candidate in its place.

    Without CHECKPOINT they are judged on a small embedded case, in seconds.

    Every value of the forward pass and every gradient is compared with a float64 oracle. Exit code 0: it is right.
    1: it is wrong, and the first divergence is printed. 2: something that was given cannot be used. If that turns out
    after the forward pass, the findings of the forward pass are printed first.
    """
    if len(candidates) > 1 and (html or json_file):
        raise InputError("--html and --json take one report: give one --candidate")
    if stream and candidates:
        raise InputError("--stream judges this package's own model: leave --candidate away, or --stream")
    if checkpoint is None:
        for option, given in (("ignore", ignore), ("images", images), ("stream", stream)):
            if given:
                raise InputError(f"--{option} needs a CHECKPOINT: name one, or leave --{option} away")
    require_outputs(html=html, json=json_file)
    with leave_when_interrupted():
        from vit_ref.verify.report import in_full, summary, to_html, to_json
        from vit_ref.verify.session import check_port, count_steps
        from vit_ref.verify.stream import check_streamed

    if images is not None:
        say_left_out(image_files.find(images).others)
    aside = STDOUT in (html, json_file)
    console = Output(stderr=aside, highlighter=Verdicts(), theme=THEME, soft_wrap=True, markup=False)
    passed, unjudged = True, None
    with _place(checkpoint) as place:
        for candidate in candidates or (None,):
            with show_progress(None if stream else count_steps(backward=not forward_only)) as progress:
                check = check_streamed if stream else partial(check_port, candidate)
                try:
                    report = check(
                        place,
                        images=images,
                        ignore=ignore,
                        precision=precision,
                        reference=reference,
                        backward=not forward_only,
                        progress=progress,
                    )
                except PartlyJudgedError as error:
                    report, unjudged = error.report, error
            if checkpoint is None:
                # The directory is gone when the report is read.
                report = dataclasses.replace(report, checkpoint=report.checkpoint._replace(path=""))
            if json_file:
                write_json(json_file, to_json(report))
            if html:
                write_output(html, to_html(report))
            console.print(in_full(report) if whole else summary(report))
            passed &= report.passed
    if passed and unjudged:
        raise unjudged
    ctx.exit(0 if passed else WRONG)


@contextlib.contextmanager
def _place(checkpoint: str | None) -> Iterator[str | Path]:
    """The checkpoint to judge on, or a temporary directory that holds the embedded case.

    Reports call a directory by the last two parts of its path.
    """
    if checkpoint is not None:
        yield checkpoint
        return
    from vit_ref.verify.cases import CASES

    with tempfile.TemporaryDirectory(prefix="vit-ref-") as scratch:
        yield CASES[CASE].write(Path(scratch, "embedded", CASE)).path
