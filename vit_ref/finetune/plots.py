"""Plots of a fine-tuning run, as PNG files.

This module does not use pyplot, which keeps global state and may need a screen. Colour-blind readers can tell apart the
colours of Okabe and Ito (2008) and the maps "viridis" and "Blues".
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vit_ref.errors import InputError
from vit_ref.files import replacing
from vit_ref.finetune.metrics import Evaluation
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION = "#0072B2", "#D55E00"
_LINES = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Pillow's images or arrays; a batch is such a sequence.
Images = Sequence[Any] | NDArray[Any]
_ACROSS = 8  # images in a row
_DIMMED, _OPAQUE = 0.6, 0.8  # brightness of the photograph below an attention map, opacity of the map's largest value
_COUNTED, _NAMED = 25, 150  # greatest number of classes for which a confusion matrix shows counts, and names


def make_visible(pixels: ArrayLike, config: ViTConfig) -> NDArray:
    """Reverses the preprocessing of a model.

    Args:
      pixels: preprocessed images (B, height, width, C), of any floating dtype.
      config: the model's configuration.

    Returns:
      Images as they look, (B, height, width, C), uint8.
    """
    todo = steps(config)
    values = np.asarray(pixels).astype(np.float64)
    if todo.mean_and_std is not None:
        mean, std = np.array(todo.mean_and_std)
        values = values * std + mean
    return np.clip(np.rint(values / (todo.scale or 1.0)), 0, 255).astype(np.uint8)


def plot_schedule(path: str | os.PathLike[str], rates: ArrayLike | Mapping[str, ArrayLike]) -> None:
    """Plots the learning rate at each step: one line, or several by name.

    Args:
      path: the PNG file.
      rates: (steps,), or name -> (steps,).

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(6.4, 3.2)
    axes = _axes(figure.add_subplot(), "step", "learning rate")
    lines = rates if isinstance(rates, Mapping) else {"": rates}
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(np.asarray(values), color=_LINES[i % len(_LINES)], label=name, linestyle=("-", "--", ":")[i % 3])
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    if any(lines):
        axes.legend(frameon=False)
    _save(figure, path)


def plot_curves(path: str | os.PathLike[str], lines: Sequence[Mapping[str, Any]]) -> None:
    """Plots the training loss by step, and the loss and accuracy on the validation images by epoch.

    Args:
      path: the PNG file.
      lines: from `read_metrics`: "step" and "loss"; "epoch", "validation_loss" and "validation_accuracy".

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(11, 3.4)
    training, loss, accuracy = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    steps_, losses = _series(lines, "step", "loss")
    _axes(training, "step", "training loss")
    window = len(losses) // 40
    training.plot(steps_, losses, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        # Each mean stands at its last step, so that it includes nothing later.
        training.plot(steps_[window - 1 :], smooth, color=BLUE, linewidth=2, label=f"running mean of {window}")
        training.legend(frameon=False)
    for axes, name, best, form in (
        (loss, "loss", np.nanargmin, "{:.3g}"),
        (accuracy, "accuracy", np.nanargmax, "{:.1%}"),
    ):
        epochs, values = _series(lines, "epoch", f"validation_{name}")
        _axes(axes, "epoch", f"validation {name}")
        axes.plot(epochs, values, color=VERMILLION, marker="o", markersize=4)
        if np.isfinite(values).any():
            at = best(values)
            axes.set_title(f"best {form.format(values[at])}, epoch {epochs[at]:g}", fontsize=10)
            axes.plot(epochs[at], values[at], marker="o", markersize=9, fillstyle="none", color="black")
    for axes in (training, loss):
        _scale_of_losses(axes)
    accuracy.yaxis.set_major_formatter(_percent())
    _save(figure, path)


def plot_batches(path: str | os.PathLike[str], before: Images, after: Images, names: Sequence[str]) -> None:
    """Plots images above their augmented versions.

    Args:
      path: the PNG file.
      before: Pillow's images, or arrays (height, width, 3), uint8 or floats from 0 to 1.
      after: the augmented version of each. `make_visible` turns a batch into such images.
      names: a name for each image.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    bands, across = math.ceil(len(before) / _ACROSS), min(len(before), _ACROSS)
    figure = _figure(1.55 * across + 0.5, 3.35 * bands + 0.2)
    grid = figure.subplots(2 * bands, across, squeeze=False)
    for i, (first, second, name) in enumerate(zip(before, after, names, strict=True)):
        row, column = 2 * (i // _ACROSS), i % _ACROSS
        _show(grid[row, column], first, _shortened(name, 20))
        _show(grid[row + 1, column], second)
        if column == 0:
            grid[row, 0].set_ylabel("before", fontsize=9)
            grid[row + 1, 0].set_ylabel("after", fontsize=9)
    _hide_unused(grid)
    _save(figure, path)


def plot_predictions(
    path: str | os.PathLike[str],
    images: Images,
    expected: Sequence[int],
    predicted: Sequence[int],
    probabilities: Sequence[float],
    names: Sequence[str],
) -> None:
    """Plots images with their predicted class, and with the true class if it differs.

    Args:
      path: the PNG file.
      images: Pillow's images, or arrays (height, width, 3), uint8 or floats from 0 to 1.
      expected: the true class id of each image.
      predicted: the predicted class id of each image.
      probabilities: the probability of each predicted class.
      names: names of the classes.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    rows, across = math.ceil(len(images) / _ACROSS), min(len(images), _ACROSS)
    figure = _figure(1.9 * across + 0.2, 2.3 * rows + 0.1)
    grid = figure.subplots(rows, across, squeeze=False)
    shown = zip(images, expected, predicted, probabilities, strict=True)
    for axes, (image, truth, guess, probability) in zip(grid.flat, shown, strict=False):
        right = truth == guess
        title = f"{'✓' if right else '✗'} {probability:.0%} {_shortened(names[guess], 22)}"
        if not right:
            title += f"\nis {_shortened(names[truth], 26)}"
        _show(axes, image, title, color=BLUE if right else VERMILLION)
    _hide_unused(grid)
    _save(figure, path)


def plot_attention_maps(path: str | os.PathLike[str], images: Images, maps: NDArray, names: Sequence[str] = ()) -> None:
    """Plots each image with its attention map on top. With several heads it adds the map of each head.

    The photograph below a map is grey and dark. Colours run from the least to the largest value of each map; low values
    are more transparent. So colours compare positions within a map, and not different maps.

    Args:
      path: the PNG file.
      images: Pillow's images, or arrays (height, width, 3), uint8 or floats from 0 to 1.
      maps: (images, heads, rows, columns), from `compute_attention_maps`.
      names: names to show beside the images, or none.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    heads = maps.shape[1] if maps.shape[1] > 1 else 0
    figure = _figure(1.35 * (heads + 2) + 0.4, 1.4 * len(images) + 0.3)
    grid = figure.subplots(len(images), heads + 2, squeeze=False)
    titles = ["image", "mean of heads" if heads else "attention", *(f"head {k}" for k in range(heads))]
    for i, (image, each, row) in enumerate(zip(images, maps, grid, strict=True)):
        colours = np.asarray(image)
        # Grey, because only the map may have colour. Dark, because a bright photograph would outshine the map.
        below = np.repeat((_DIMMED * colours.mean(-1, keepdims=True)).astype(colours.dtype), 3, axis=-1)
        _show(row[0], colours)
        for axes, values in zip(row[1:], [each.mean(0), *each][: heads + 1], strict=True):
            _show(axes, below)
            above_least = np.asarray(values, np.float64) - values.min()
            # A constant map shows nothing.
            strength = above_least / max(above_least.max(), np.finfo(np.float32).tiny)
            extent, alpha = axes.images[0].get_extent(), _OPAQUE * strength
            axes.imshow(strength, cmap="viridis", vmin=0, vmax=1, alpha=alpha, extent=extent, interpolation="nearest")
        if names:
            row[0].set_ylabel(_shortened(names[i], 18), fontsize=8, parse_math=False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    _save(figure, path)


def plot_confusion(path: str | os.PathLike[str], evaluation: Evaluation, names: Sequence[str]) -> None:
    """Plots the confusion matrix: each row is a true class, coloured by the share taken for each class.

    Up to 25 classes it shows counts, and up to 150 names. A class without an image is grey.

    Args:
      path: the PNG file.
      evaluation: the evaluation to plot.
      names: names of the classes.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    classes = len(evaluation.confusion)
    side = min(max(0.16 * classes, 0.42 * min(classes, _COUNTED), 2.5), 18)
    figure = _figure(side + 2.6, side + 2)
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    colours = colormaps["Blues"].with_extremes(bad="#dddddd")
    # The square root makes confusions of a few percent visible.
    shown = axes.imshow(evaluation.shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    ticks = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, aspect=max(20, 5 * side), ticks=ticks, format=_percent())
    bar.set_label("share of the class's images")
    if classes <= _NAMED:
        size = 9 if classes <= _COUNTED else 7
        shortened = [_shortened(name, 24) for name in names]
        axes.set_xticks(range(classes), shortened, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(classes), shortened, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{evaluation.accuracy:.1%} of {evaluation.images} images")
    if classes <= _COUNTED:
        for (row, column), count in np.ndenumerate(evaluation.confusion):
            if count:
                colour = "white" if evaluation.shares[row, column] > 0.4 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'vit-ref[finetune]'") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _axes(axes: Axes, x: str, y: str) -> Axes:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    return axes


def _series(lines: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[NDArray, NDArray]:
    """Returns two columns of the log, with NaN, a gap in the curve, for values that are not finite."""
    pairs = [(line[x], line[y]) for line in lines if x in line and y in line]
    values = np.array(pairs, np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _scale_of_losses(axes: Axes) -> None:
    """Makes the axis logarithmic if the losses span more than a factor of 30."""
    values = np.concatenate([line.get_ydata() for line in axes.lines]).astype(np.float64)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    elif len(values):
        axes.set_ylim(bottom=min(0, values.min()))


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1)


def _show(axes: Axes, image: Any, title: str = "", color: str = "black") -> None:
    axes.imshow(np.asarray(image))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    # matplotlib would read mathematics between the dollar signs of a name.
    axes.set_title(title, fontsize=8, color=color, parse_math=False)


def _hide_unused(grid: NDArray) -> None:
    for axes in grid.flat:
        if not axes.images:
            axes.set_axis_off()


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the PNG file under a temporary name and renames it."""
    path = Path(path)
    try:
        with replacing(path) as staged, warnings.catch_warnings():
            # matplotlib draws a box for a letter of a class's name that its font lacks.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
            figure.savefig(staged, format="png", bbox_inches="tight")
    except OSError as error:
        raise InputError(f"{path}: it cannot be written ({error.strerror}): give another place") from None
