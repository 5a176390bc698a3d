"""`vit-ref finetune`: a classifier from images."""

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
from vit_ref.finetune.options import add_recipe_options, make_recipe


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--data", metavar="DIR|HUB_ID", help="Image folder or data set; else a small embedded one.")
@click.option("--train-split", default="train", show_default=True, help="As in train[:5000].")
@click.option("--validation-split", default="validation", show_default=True, help="Likewise.")
@click.option("--classes", type=click.IntRange(2), metavar="N", help="Only the first N classes.")
@click.option(
    "--bad-images", type=click.Choice(["error", "skip"]), default="error", show_default=True, help="Unreadable ones."
)
@click.option("--output-dir", type=LOCAL, default=Path("run"), show_default=True, help="The run's place.")
@click.option("--resume", is_flag=True, help="Go on where the run in --output-dir was stopped, or begin it.")
@ignore_option
@add_recipe_options
@click.option("--num-workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that load images.")
@click.option("--save-steps", type=click.IntRange(1), metavar="N", help="Checkpoint every N steps, too.")
@click.option(
    "--save-total-limit", type=click.IntRange(1), default=2, show_default=True, help="Last checkpoints to keep."
)
@click.option(
    "--sharding",
    type=click.Choice(["data", "fsdp"]),
    default="data",
    show_default=True,
    help="Parameters on several devices: whole on each, or divided.",
)
@click.option("--tensorboard", is_flag=True, help="Log for TensorBoard, too.")
@click.option("--plots/--no-plots", default=True, show_default=True)
@click.option("--coordinator", metavar="HOST:PORT", help="Address of the first of several processes.")
@click.option("--num-processes", type=click.IntRange(1), help="How many there are.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this is.")
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

    Without CHECKPOINT a small model is trained from scratch. The model that does best on the validation images is saved
    in OUTPUT_DIR/model, which transformers, `vit-ref predict` and `vit-ref verify` load. Defaults are those of Flax's
    ViT tutorial.
    """
    chosen = make_recipe(recipe)
    if not process_id:  # the first of several processes begins the run for all
        require_free(output_dir, resume=resume)
    _join_processes(coordinator, num_processes, process_id)
    # If the disk is full, Orbax and tensorstore fill pages there with what becomes one line here.
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
            say(f"left out: {reason}")
        if images.bad:
            say(f"left out: {len(images.bad)} of {len(images.bad) + len(images)} images")
    say_left_out({*training.others, *validation.others})
    conduct = run.Conduct(num_workers, save_steps, save_total_limit, sharding, tensorboard)
    outcome = run.finetune(checkpoint, training, validation, output_dir, chosen, conduct, resume=resume, ignore=ignore)
    if outcome.writes:
        if plots:
            illustrate(outcome, training, validation, chosen)
        click.echo(run.summarise(outcome))


def _join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, if the options ask for several.

    Raises:
      InputError: some of the three are missing, or jax cannot join them.
    """
    together = (coordinator, num_processes, process_id)
    if all(given is None for given in together):
        return
    if any(given is None for given in together):
        raise InputError("--coordinator, --num-processes and --process-id belong together: give all three")
    with leave_when_interrupted():
        import jax

    # What jax raises of an address or a number that makes no sense has no family of its own.
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except Exception as error:
        raise InputError(
            f"--coordinator {coordinator} --num-processes {num_processes} --process-id {process_id}: they cannot be"
            f" joined ({' '.join(str(error).split())}): give HOST:PORT, and numbers from 0 to"
            f" {(num_processes or 1) - 1}"
        ) from None
