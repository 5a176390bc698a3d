"""The command `vit-ref finetune`: trains a classifier on images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import click

from vit_ref.cli.console import say, say_left_out
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import LOCAL, ignore_option
from vit_ref.errors import InputError
from vit_ref.finetune.directory import require_free
from vit_ref.finetune.recipe_options import add_recipe_options, make_recipe


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--data", metavar="DIR|HUB_ID", help="Image folder or data set. Default: a small embedded one.")
@click.option("--train-split", default="train", show_default=True, help="Split to train on, or a slice: train[:5000].")
@click.option("--validation-split", default="validation", show_default=True, help="Split to validate on, or a slice.")
@click.option("--classes", type=click.IntRange(2), metavar="N", help="Use only the first N classes.")
@click.option(
    "--bad-images",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What to do with unreadable images.",
)
@click.option(
    "--output-dir", type=LOCAL, default=Path("run"), show_default=True, help="Directory for all files of the run."
)
@click.option("--resume", is_flag=True, help="Continue the run in --output-dir, or begin it if there is none.")
@ignore_option
@add_recipe_options
@click.option("--num-workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that load images.")
@click.option("--save-steps", type=click.IntRange(1), metavar="N", help="Save every N steps, besides after each epoch.")
@click.option(
    "--save-total-limit",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Number of latest checkpoints to keep, besides the best.",
)
@click.option(
    "--sharding",
    type=click.Choice(["data", "fsdp"]),
    default="data",
    show_default=True,
    help="Parameters on several devices: data copies them to each, fsdp divides them.",
)
@click.option("--tensorboard", is_flag=True, help="Write logs for TensorBoard, too.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw the plots of the run.")
@click.option("--coordinator", metavar="HOST:PORT", help="Address of the first process, if there are several.")
@click.option("--num-processes", type=click.IntRange(1), help="Number of processes.")
@click.option("--process-id", type=click.IntRange(0), help="Number of this process, from 0.")
def finetune(
    checkpoint: str | None,
    data: str | None,
    train_split: str,
    validation_split: str,
    classes: int | None,
    bad_images: Literal["error", "skip"],
    output_dir: Path,
    resume: bool,
    ignore: tuple[str, ...],
    num_workers: int,
    save_steps: int | None,
    save_total_limit: int,
    sharding: Literal["data", "fsdp"],
    tensorboard: bool,
    plots: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **recipe: Any,
) -> None:
    """Fine-tune CHECKPOINT, a directory, file or hub id, on images.

    Without CHECKPOINT the command trains a small model from scratch. In OUTPUT_DIR/model it saves the model that does
    best on the validation images. transformers, `vit-ref predict` and `vit-ref verify` load that directory. The
    defaults are those of Flax's ViT tutorial.
    """
    chosen = make_recipe(recipe)
    if not process_id:  # the first of several processes begins the run for all
        require_free(output_dir, resume=resume)
    _join_processes(coordinator, num_processes, process_id)
    # On a full disk Orbax and tensorstore log pages to these two. This command prints one line instead.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with leave_when_interrupted():
        from vit_ref.finetune import run
        from vit_ref.finetune.data import open_dataset
        from vit_ref.finetune.illustration import illustrate, require_plots

    if plots:
        require_plots(output_dir)
    training = open_dataset(data, train_split, classes=classes, on_bad=bad_images)
    validation = open_dataset(data, validation_split, classes=training.classes, on_bad=bad_images)
    for images in (training, validation):
        for reason in images.bad:
            say(f"skipped: {reason}")
        if images.bad:
            say(f"skipped {len(images.bad)} of {len(images.bad) + len(images)} images")
    say_left_out({*training.others, *validation.others})
    conduct = run.Conduct(num_workers, save_steps, save_total_limit, sharding, tensorboard)
    outcome = run.finetune(checkpoint, training, validation, output_dir, chosen, conduct, resume=resume, ignore=ignore)
    if outcome.writes:
        if plots:
            illustrate(outcome, training, validation, chosen)
        click.echo(run.summarise(outcome))


def _join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, if the options name several.

    Raises:
      InputError: the caller gave only some of the three, or jax cannot join the processes.
    """
    together = (coordinator, num_processes, process_id)
    if all(given is None for given in together):
        return
    if any(given is None for given in together):
        raise InputError("only some of --coordinator, --num-processes and --process-id were given: give all three")
    with leave_when_interrupted():
        import jax

    # jax has no common exception class for a wrong address or number.
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except Exception as error:
        raise InputError(
            f"--coordinator {coordinator} --num-processes {num_processes} --process-id {process_id}: jax cannot join"
            f" these processes ({' '.join(str(error).split())}): give HOST:PORT, and a --process-id from 0 to"
            f" {(num_processes or 1) - 1}"
        ) from None
