"""The command `vit-ref predict`: classifies images."""

from __future__ import annotations

from pathlib import Path

import click

from vit_ref.cli.console import show_progress
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import LOCAL, ignore_option, json_option
from vit_ref.cli.outputs import print_result, require_outputs


@click.command()
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, type=LOCAL, metavar="IMAGE...")
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to print for each image."
)
@ignore_option
@json_option
def predict(
    checkpoint: str, images: tuple[Path, ...], top: int, ignore: tuple[str, ...], json_file: Path | None
) -> None:
    """Classify each IMAGE with CHECKPOINT, a directory, file or hub id.

    The command prints the likeliest classes with their probabilities, or the values of a regression.
    """
    require_outputs(json=json_file)
    with show_progress(len(images)) as progress:
        with leave_when_interrupted():
            from vit_ref.finetune.prediction import predict_each
            from vit_ref.finetune.probabilities import name_unit
            from vit_ref.weights.pretrained import from_pretrained

        model = from_pretrained(checkpoint, ignore=ignore)
        results, predictions = predict_each(model, images, top), []
        for number in range(1, len(images) + 1):
            progress(f"image {number} of {len(images)}")
            predictions.append(next(results))
    kind = name_unit(model.config)
    lines, content = [], []
    for file, each in zip(images, predictions, strict=True):
        content.append({"image": str(file), "predictions": [{"label": label, kind: value} for label, value in each]})
        lines.append(click.format_filename(file))
        for label, value in each:
            lines.append(f"{100 * value:7.2f} %  {label}" if kind == "probability" else f"{value:12.6g}  {label}")
    print_result("\n".join(lines), json_file, content)
