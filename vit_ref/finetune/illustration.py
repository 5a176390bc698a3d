"""The plots of a run: images, learning curves, and predictions on the validation images."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_ref.errors import InputError
from vit_ref.extras import extra
from vit_ref.finetune import plots
from vit_ref.finetune.attention import compute_attention_maps
from vit_ref.finetune.augmentation import Augmentation
from vit_ref.finetune.data import ImageDataset
from vit_ref.finetune.directory import METRICS
from vit_ref.finetune.loading import draw
from vit_ref.finetune.metrics import read_metrics
from vit_ref.finetune.prediction import compute_logits
from vit_ref.finetune.probabilities import compute_scores
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.run import Outcome

PLOTS = "plots"
_SHOWN, _ATTENDED = 24, 6


def require_plots(out: str | os.PathLike[str]) -> None:
    """Checks before the training that `illustrate` will be able to draw.

    Args:
      out: the run's directory. It need not exist yet.

    Raises:
      InputError: matplotlib is missing, or the place of the plots is not a directory.
    """
    # Only the first of several processes draws, so only that one needs matplotlib.
    if jax.process_index():
        return
    extra("matplotlib", "drawing plots")
    directory = Path(out) / PLOTS
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise InputError(
            f"{directory}: it is not a directory, and the plots need it: move it away, or give another --output-dir"
        )


def illustrate(outcome: Outcome, training: ImageDataset, validation: ImageDataset, recipe: Recipe) -> None:
    """Saves every plot of a finished run as a PNG file in the run's directory `plots/`.

    Args:
      outcome: the result of `finetune`.
      training: the training images.
      validation: the validation images.
      recipe: the recipe of the run.

    Raises:
      InputError: matplotlib is missing, or a file cannot be written. `require_plots` finds most causes beforehand.
    """
    run = outcome.directory.parent
    directory = run / PLOTS
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory}: it cannot be made ({error.strerror}): mend that, and continue with --resume"
        ) from None
    config, names = outcome.model.config, validation.classes
    lines = read_metrics(run / METRICS)
    plots.plot_schedule(
        directory / "schedule.png", [line["learning_rate"] for line in lines if "learning_rate" in line]
    )
    plots.plot_curves(directory / "curves.png", lines)
    plots.plot_confusion(directory / "confusion.png", outcome.evaluation, names)

    chosen = _spread(len(training), 8)
    augment = Augmentation() if recipe.augment else None
    after = np.stack([draw(training, config, augment, recipe.seed, 0, index) for index in chosen])
    photographs = [training[index] for index in chosen]
    plots.plot_batches(
        directory / "batches.png",
        [photograph.image for photograph in photographs],
        plots.make_visible(after, config),
        [names[photograph.label] for photograph in photographs],
    )

    chosen = _spread(len(validation), _SHOWN)
    pixels = np.stack([draw(validation, config, None, recipe.seed, 0, index) for index in chosen])
    probabilities = compute_scores(compute_logits(*nnx.split(outcome.model), jnp.asarray(pixels)), config)
    seen = plots.make_visible(pixels, config)
    plots.plot_predictions(
        directory / "predictions.png",
        seen,
        [validation[index].label for index in chosen],
        probabilities.argmax(-1).tolist(),
        probabilities.max(-1).tolist(),
        names,
    )
    maps = compute_attention_maps(outcome.model, pixels[:_ATTENDED])
    plots.plot_attention_maps(directory / "attention.png", seen[:_ATTENDED], maps)


def _spread(length: int, count: int) -> list[int]:
    """Returns indices spread evenly over the images, which come sorted by class."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()
