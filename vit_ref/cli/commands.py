"""The command line: `vit-ref verify | convert | propose | finetune | predict | bench`.

Exit code 0: passed. 1: the port is wrong. 2: the input cannot be used, said in one line. 130: interrupted. 141: nobody
reads on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.theme import Theme

from vit_ref import image_files
from vit_ref.errors import InputError
from vit_ref.extras import extra
from vit_ref.files import require_local
from vit_ref.finetune.options import recipe_from, recipe_options
from vit_ref.verify.precision import PRECISIONS
from vit_ref.weights import conversion

if TYPE_CHECKING:
    from vit_ref.bench.measure import Timing

WRONG, UNUSABLE, INTERRUPTED, UNREAD = 1, 2, 130, 141
# As a file, standard output: nothing else is written there then.
_STDOUT = Path("-")


class _Verdicts(RegexHighlighter):
    """Colours the words that decide, where a terminal shows them."""

    base_style = "verdict."
    highlights = [  # noqa: RUF012  # rich's own way
        r"(?P<good>\bpass(es|ed)?\b)",
        r"(?P<bad>\b(first divergence|failed|FAILED|stale expectation|both|rounding$|float64$)\b)",
        r"(?P<open>\b(not observed|expected failure|likely cause)\b)",
    ]


_THEME = Theme({"verdict.good": "green", "verdict.bad": "bold red", "verdict.open": "yellow"})


class _Output(Console):
    """A console that leaves a closed pipe to `_answered`: to rich it is exit code 1, which here is a verdict."""

    def on_broken_pipe(self) -> None:
        raise  # what rich is handling


_ERRORS = _Output(stderr=True, soft_wrap=True, highlight=False)


class _Group(click.Group):
    """Commands whose errors of input are one line and exit code 2, as click's own are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the installed command calls."""
        # A path may hold bytes that are no text: after the work is done is no time to fail on printing it.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().__call__(*args, **kwargs)
        except SystemExit as end:
            if end.code == INTERRUPTED:  # pragma: no cover  # os._exit leaves without its coverage, too
                # At its end Python takes jaxlib down while that still compiles in threads of its own: a segmentation
                # fault, and exit code 139.
                sys.stdout.flush()
                os._exit(INTERRUPTED)
            raise

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parses the arguments, which is when help and version are printed."""
        with _answered():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with _answered():
            return super().invoke(ctx)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Ends the process with the exit code of what is raised within it, and one line; to click most of it is a 1."""
    try:
        try:
            yield
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except InputError as error:
            _ERRORS.print(f"vit-ref: {error}", markup=False)
            sys.exit(UNUSABLE)
        except KeyboardInterrupt:
            _ERRORS.print("vit-ref: interrupted, nothing is left half-written", markup=False)
            sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # At its end Python writes what is left, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(UNREAD)


class _LocalPath(click.Path):
    """A path on this machine. A URL is refused before any work, in one line as all other input."""

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Any:
        name = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else "the path"
        require_local(value, name)
        return super().convert(value, parameter, ctx)


_LOCAL = _LocalPath(path_type=Path)


class _Notes(logging.Handler):
    """Shows what the package logs as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        _ERRORS.print(f"vit-ref: {record.getMessage()}", markup=False)


_ignore = click.option(
    "--ignore", "exempt", multiple=True, metavar="PATTERN", help="Leave these tensors behind; repeatable."
)


def _version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from vit_ref.verify.environment import environment

    for name, value in environment().items():
        click.echo(f"{name} {value}")
    ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the stack.")
def main() -> None:
    """A Vision Transformer in Flax NNX, and proof that ports of ViT weights are numerically right."""
    logging.getLogger("vit_ref").handlers = [_Notes()]


@main.command()
@click.argument("checkpoint")
@click.option(
    "--candidate", "candidates", multiple=True, metavar="FILE.py|module:attr", help="Port to judge; repeatable."
)
@click.option("--reference", type=click.Choice(["flax", "torch", "numpy"]), default="flax", show_default=True)
@click.option(
    "--precision",
    "--dtype",
    "precision",
    type=click.Choice(list(PRECISIONS)),
    default="float32",
    show_default=True,
    help="What the numerical gate judges.",
)
@click.option("--images", type=_LOCAL, metavar="DIR", help="Photographs; else synthetic images.")
@_ignore
@click.option("--forward-only", is_flag=True, help="No gradients.")
@click.option("--stream", is_flag=True, help="Hold one block at a time, however deep the model. Not with --candidate.")
@click.option("--table", "whole", is_flag=True, help="Print every site's errors.")
@click.option("--html", type=_LOCAL, metavar="FILE", help="Write the report as one page; - prints it.")
@click.option(
    "--json",
    "json_file",
    type=_LOCAL,
    metavar="FILE",
    help="Write the report as JSON; - prints it.",
)
@click.pass_context
def verify(
    ctx: click.Context,
    checkpoint: str,
    candidates: tuple[str, ...],
    reference: str,
    precision: str,
    images: Path | None,
    exempt: tuple[str, ...],
    forward_only: bool,
    stream: bool,
    whole: bool,
    html: Path | None,
    json_file: Path | None,
) -> None:
    """Judge a port on CHECKPOINT, a directory, file or hub id: this package's own, or each --candidate.

    Every value of the forward pass and every gradient is compared with a float64 oracle. Exit code 0: it is right.
    1: it is wrong, and the first divergence is printed. 2: something that was given cannot be used; where that is found
    out after the forward pass, what was found there is printed first.
    """
    if len(candidates) > 1 and (html or json_file):
        raise InputError("--html and --json take one report: give one --candidate")
    if stream and candidates:
        raise InputError("--stream judges this package's own model: leave --candidate away, or --stream")
    _require_places(html=html, json=json_file)
    from vit_ref.errors import PartlyJudgedError
    from vit_ref.verify.report import summary, table, to_html, to_json
    from vit_ref.verify.session import check_port, count_steps
    from vit_ref.verify.stream import check_streamed

    if images is not None:
        _say_left_out(image_files.find(images).others)
    aside = _STDOUT in (html, json_file)
    console = _Output(stderr=aside, highlighter=_Verdicts(), theme=_THEME, soft_wrap=True, markup=False)
    passed, unjudged = True, None
    for candidate in candidates or (None,):
        with _progress(None if stream else count_steps(backward=not forward_only)) as progress:
            judge = check_streamed if stream else partial(check_port, candidate)
            try:
                report = judge(
                    checkpoint,
                    images=images,
                    exempt=exempt,
                    precision=precision,
                    reference=reference,
                    backward=not forward_only,
                    progress=progress,
                )
            except PartlyJudgedError as error:
                report, unjudged = error.report, error
        if html:
            _write(html, to_html(report))
        if json_file:
            _write(json_file, json.dumps(to_json(report), indent=1, ensure_ascii=False) + "\n")
        if whole:
            for part in (report.forward, report.backward):
                console.print(f"{table(part)}\n" if part else "")
        console.print(summary(report))
        passed &= report.passed
    if passed and unjudged:
        raise unjudged
    ctx.exit(0 if passed else WRONG)


@main.command()
@click.argument("source")
@click.argument("destination", type=_LOCAL)
@click.option("--to", "layout", type=click.Choice(get_args(conversion.Target)), required=True, help="Layout to write.")
@_ignore
def convert(source: str, destination: Path, layout: conversion.Target, exempt: tuple[str, ...]) -> None:
    """Write the checkpoint SOURCE to DESTINATION in another layout, value for value, and read it back."""
    click.echo(conversion.convert(source, destination, layout, exempt=exempt))


@main.command()
@click.argument("candidate")
@click.argument("checkpoint")
def propose(candidate: str, checkpoint: str) -> None:
    """Propose the table of sites for CANDIDATE, FILE.py or module:attr, by running it beside the oracle."""
    from vit_ref.verify.propose.proposal import propose as proposed

    click.echo(proposed(candidate, checkpoint))


@main.command("finetune")
@click.argument("checkpoint", required=False)
@click.option("--data", metavar="DIR|HUB_ID", help="Image folder or data set; else a small embedded one.")
@click.option("--train-split", default="train", show_default=True, help="As in train[:5000].")
@click.option("--validation-split", default="validation", show_default=True, help="Likewise.")
@click.option("--classes", type=click.IntRange(2), metavar="N", help="Only the first N classes.")
@click.option(
    "--bad-images", type=click.Choice(["error", "skip"]), default="error", show_default=True, help="Unreadable ones."
)
@click.option("--out", type=_LOCAL, default=Path("run"), show_default=True, help="The run's place.")
@click.option("--resume", is_flag=True, help="Go on where the run in --out was stopped, or begin it.")
@_ignore
@recipe_options
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that load images.")
@click.option("--save-every", type=click.IntRange(1), metavar="N", help="Checkpoint every N steps, too.")
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Last checkpoints to keep.")
@click.option(
    "--sharding",
    type=click.Choice(["data", "fsdp"]),
    default="data",
    show_default=True,
    help="Parameters on several devices: whole on each, or divided.",
)
@click.option("--tensorboard", is_flag=True, help="Log for TensorBoard, too.")
@click.option("--plots/--no-plots", default=True, show_default=True)
@click.option("--coordinator", metavar="HOST:PORT", help="Of several processes, the first one's address.")
@click.option("--processes", type=click.IntRange(1), help="How many there are.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this is.")
def finetune_command(
    checkpoint: str | None,
    data: str | None,
    train_split: str,
    validation_split: str,
    classes: int | None,
    bad_images: Literal["error", "skip"],
    out: Path,
    resume: bool,
    exempt: tuple[str, ...],
    workers: int,
    save_every: int | None,
    keep: int,
    sharding: Literal["data", "fsdp"],
    tensorboard: bool,
    plots: bool,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    **recipe: Any,
) -> None:
    """Fine-tune CHECKPOINT, a directory, file or hub id, on images.

    Without CHECKPOINT a small model is trained from scratch. What is best on the validation images is saved in
    OUT/model, which transformers, `vit-ref predict` and `vit-ref verify` load. Defaults are those of Flax's ViT
    tutorial.
    """
    chosen = recipe_from(recipe)
    together = (coordinator, processes, process_id)
    if any(given is not None for given in together):
        if any(given is None for given in together):
            raise InputError("--coordinator, --processes and --process-id belong together: give all three")
        import jax

        # What jax raises of an address or a number that makes no sense has no family of its own.
        try:
            jax.distributed.initialize(coordinator, processes, process_id)
        except Exception as error:
            raise InputError(
                f"--coordinator {coordinator} --processes {processes} --process-id {process_id}: they cannot be joined"
                f" ({' '.join(str(error).split())}): give HOST:PORT, and numbers from 0 to {(processes or 1) - 1}"
            ) from None
    # Of a full disk Orbax and tensorstore say there, over pages, what becomes one line here.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from vit_ref.finetune.data import open_dataset
    from vit_ref.finetune.illustrate import illustrate, require_plots
    from vit_ref.finetune.run import Conduct, finetune, summary

    if plots:
        require_plots(out)
    training = open_dataset(data, train_split, classes=classes, on_bad=bad_images)
    validation = open_dataset(data, validation_split, classes=training.classes, on_bad=bad_images)
    for images in (training, validation):
        for reason in images.bad:
            _ERRORS.print(f"vit-ref: left out: {reason}", markup=False)
        if images.bad:
            _ERRORS.print(f"vit-ref: left out: {len(images.bad)} of {len(images.bad) + len(images)} images")
    _say_left_out({*training.others, *validation.others})
    conduct = Conduct(workers, save_every, keep, sharding, tensorboard)
    outcome = finetune(checkpoint, training, validation, out, chosen, conduct, resume=resume, exempt=exempt)
    if outcome.writes:
        if plots:
            illustrate(outcome, training, validation, chosen)
        click.echo(summary(outcome))


@main.command()
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, type=_LOCAL, metavar="IMAGE...")
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to print for each image."
)
@_ignore
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(checkpoint: str, images: tuple[Path, ...], top: int, exempt: tuple[str, ...], as_json: bool) -> None:
    """Name what is in each IMAGE by the classifier CHECKPOINT, a directory or hub id.

    Each class has a probability. A regression, which has none, prints its values.
    """
    with _progress(len(images)) as progress:
        from vit_ref.finetune.predict import predictions
        from vit_ref.finetune.probabilities import unit
        from vit_ref.weights.pretrained import from_pretrained

        model = from_pretrained(checkpoint, exempt=exempt)
        results, found = predictions(model, images, top), []
        for number in range(1, len(images) + 1):
            progress(f"image {number} of {len(images)}")
            found.append(next(results))
    kind = unit(model.config)
    if as_json:
        named = [[{"label": label, kind: value} for label, value in each] for each in found]
        content = [{"image": str(file), "predictions": each} for file, each in zip(images, named, strict=True)]
        click.echo(json.dumps(content, indent=1))
        return
    for file, each in zip(images, found, strict=True):
        click.echo(click.format_filename(file))
        for label, value in each:
            click.echo(f"{100 * value:7.2f} %  {label}" if kind == "probability" else f"{value:12.6g}  {label}")


@main.command()
@click.option("--size", "sizes", multiple=True, metavar="SIZE", help="As Ti/16 or B/16; repeatable.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Images; repeatable.")
@click.option("--precision", "precisions", multiple=True, help="float32, tensorfloat32, mixed or float16; repeatable.")
@click.option("--pass", "passes", multiple=True, help='"forward" or "train step"; repeatable. Else both.')
@click.option("--implementation", "names", multiple=True, help="One of those installed; repeatable. Else all.")
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Of each, in turns.")
@click.option("--plot", "picture", type=_LOCAL, metavar="FILE", help="Draw a PNG.")
@click.option(
    "--json",
    "json_file",
    type=_LOCAL,
    metavar="FILE",
    help="Write all rounds as JSON; - prints it.",
)
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
    """Time forward pass and train step beside FlaxViT, and PyTorch where it is installed, in turns.

    Without options: what two cores do in a minute, or what fills an accelerator.
    """
    _require_places(plot=picture, json=json_file)
    from vit_ref.bench.report import plot, table
    from vit_ref.bench.session import session
    from vit_ref.verify.environment import environment

    console = _Output(stderr=json_file == _STDOUT, soft_wrap=False)
    timings: list[Timing] = []

    def say(line: str) -> None:
        _ERRORS.print(f"vit-ref: {line}", markup=False)

    if picture:
        extra("matplotlib.figure", "a plot of throughput")
    try:
        for group in session(sizes, batches, precisions, passes, names, rounds, say):
            console.print(table(group))
            console.print()
            timings += group
    finally:
        # What was timed before one did not fit, or somebody had enough, is not lost.
        if timings and json_file:
            content = {"environment": environment(), "timings": [timing.to_json() for timing in timings]}
            _write(json_file, json.dumps(content, indent=1) + "\n")
        if timings and picture:
            plot(picture, timings)


def _say_left_out(files: Collection[PurePath | str]) -> None:
    """Counts the files that were not taken for images, so that nobody misses theirs in silence."""
    if files:
        _ERRORS.print(f"vit-ref: left out, no image by its suffix: {image_files.counted(files)}", markup=False)


def _write(file: Path, text: str) -> None:
    from vit_ref.verify.report import write

    if file == _STDOUT:
        click.echo(text, nl=False)
    else:
        write(file, text)


def _require_places(**files: Path | None) -> None:
    """Says now, and not after minutes of work, which of a command's files, by option, cannot be written."""
    given = {option: file for option, file in files.items() if file}
    for file in given.values():
        if file == _STDOUT:
            continue
        if not os.path.isdir(file.absolute().parent):
            raise InputError(f"{file}: no such directory: make it first")
        if os.path.isdir(file):  # unlike Path.is_dir, it takes a name that is too long
            raise InputError(f"{file}: is a directory: name a file")
        if os.path.islink(file) or (os.path.exists(file) and not os.path.isfile(file)):
            continue  # a pipe, say, which is written to and not replaced
        try:
            with tempfile.TemporaryFile(dir=file.absolute().parent):
                pass
        except OSError as error:
            raise InputError(f"{file}: cannot be written there ({error.strerror}): name another place") from None
    if len(given) > 1 and len({file.resolve() for file in given.values()}) == 1:
        first = next(iter(given.values()))
        raise InputError(f"{first}: {' and '.join(f'--{option}' for option in given)} are the same file: give two")


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal, which names the step; nothing where there is no terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the checkpoint", total=total)
        done = 0

        def step(doing: str) -> None:
            nonlocal done
            # More than was expected, where the verdict takes a closer look.
            bar.update(task, completed=done, description=doing, total=total and max(total, done + 1))
            done += 1

        yield step


if __name__ == "__main__":
    main()
