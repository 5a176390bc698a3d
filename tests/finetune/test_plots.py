"""Do the plots show their numbers, legibly, and are files written whole or not at all?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from vit_ref.errors import InputError
from vit_ref.finetune import plots
from vit_ref.finetune.illustration import illustrate, require_plots
from vit_ref.finetune.metrics import Evaluation
from vit_ref.finetune.recipe import Recipe
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import preprocess

# The longest name in Food-101 has 23 letters. No font of matplotlib's has an apple. Dollar signs would be mathematics,
# with a mistake in it.
NAMES = ("strawberry_shortcake", "ph\U0001f34f", "grilled_cheese_sandwich", "$\\x$")


def names(count: int) -> list[str]:
    return [f"{NAMES[i % 4]}{i}" for i in range(count)]


def photographs(count: int, height: int = 24, width: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8))


def log(steps: int, per_epoch: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 3 * 0.99**step})
        if step % per_epoch == 0:
            accuracy = 1 - 0.5**step if step < steps else 0.25
            lines.append({"step": step, "epoch": step // per_epoch, "validation_loss": 2 / step})
            lines[-1]["validation_accuracy"] = accuracy
    return lines


def evaluated(classes: int, empty: int = 1) -> Evaluation:
    """An evaluation with a class without an image, and with confusions."""
    labels = np.repeat(np.delete(np.arange(classes), empty), 10)
    predicted = np.where(np.arange(len(labels)) % 5 == 0, (labels + 2) % classes, labels)
    return Evaluation.of_predicted(predicted, labels, classes)


def predicted(count: int, classes: int = 10) -> tuple[Any, ...]:
    truth = [i % classes for i in range(count)]
    guess = [k if k % 3 else (k + 2) % classes for k in truth]
    return photographs(count), truth, guess, np.linspace(0.3, 1, count), names(classes)


MAPS = np.random.default_rng(0).random((3, 4, 3, 4), np.float32)
PLOTS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "schedule": (plots.plot_schedule, (np.linspace(0, 1e-4, 50),)),
    "schedules": (plots.plot_schedule, ({"backbone": np.linspace(0, 1e-4, 50), "head": np.linspace(1e-3, 0, 50)},)),
    "curves": (plots.plot_curves, (log(200, 20),)),
    "curves of one epoch": (plots.plot_curves, (log(3, 3),)),
    "curves of nothing": (plots.plot_curves, ([],)),
    "batches": (plots.plot_batches, (photographs(11), photographs(11), names(11))),
    "one batch": (plots.plot_batches, ([Image.fromarray(photographs(1)[0])], photographs(1), names(1))),
    "predictions": (plots.plot_predictions, predicted(11)),
    "one prediction": (plots.plot_predictions, predicted(1)),
    "attention": (plots.plot_attention_maps, (photographs(3), MAPS, names(3))),
    "rollout": (plots.plot_attention_maps, (photographs(3), MAPS[:, :1])),
    **{f"confusion {n}": (plots.plot_confusion, (evaluated(n), names(n))) for n in (2, 10, 25, 101, 150, 151)},
}


class Drawn:
    """The last figure that was written, and the pixels of each visible text in it."""

    def __init__(self) -> None:
        self.figure = Figure()
        self.boxes: dict[Text, Bbox] = {}

    @property
    def axes(self) -> list[Axes]:
        return self.figure.axes

    @property
    def titles(self) -> list[str]:
        return [axes.get_title() for axes in self.axes]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Records what is drawn."""
    found, save, draw = Drawn(), plots._save, Text.draw

    def saved(figure: Figure, path: Path) -> None:
        found.figure = figure
        found.boxes.clear()
        save(figure, path)

    def traced(text: Text, renderer: Any, *arguments: Any, **options: Any) -> None:
        draw(text, renderer, *arguments, **options)
        if text.get_visible() and text.get_text().strip():
            found.boxes[text] = text.get_window_extent(renderer)

    monkeypatch.setattr(plots, "_save", saved)
    monkeypatch.setattr(Text, "draw", traced)
    return found


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_png_in_which_no_text_runs_over_another(name: str, drawn: Drawn, tmp_path: Path) -> None:
    plot, arguments = PLOTS[name]
    plot(tmp_path / "plot.png", *arguments)
    assert os.listdir(tmp_path) == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 1
        assert 200 < max(image.size) < 2400  # it fits a page or a screen in full size
    assert len(drawn.boxes) >= 1
    for (one, box), (other, another) in combinations(drawn.boxes.items(), 2):
        # A box is a pixel wider than its content.
        overlap = Bbox.intersection(box.padded(-1), another.padded(-1))
        assert overlap is None, f"{one.get_text()!r} runs over {other.get_text()!r}"


def test_a_schedule_shows_every_rate_under_its_name(drawn: Drawn, tmp_path: Path) -> None:
    rates = {"backbone": np.linspace(0, 1e-4, 50), "head": np.linspace(1e-3, 0, 50)}
    plots.plot_schedule(tmp_path / "plot.png", rates)
    (axes,) = drawn.axes
    for line, (name, values) in zip(axes.lines, rates.items(), strict=True):
        assert (line.get_ydata() == values).all()
        assert line.get_label() == name
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(rates)


def test_curves_show_the_log(drawn: Drawn, tmp_path: Path) -> None:
    lines = log(200, 20)
    lines[30] |= {"loss": None}
    plots.plot_curves(tmp_path / "plot.png", lines)
    training, loss, accuracy = drawn.axes
    steps, losses = training.lines[0].get_data()
    assert list(steps) == list(range(1, 201))
    assert np.isnan(losses[lines[30]["step"] - 1]) and np.isnan(losses).sum() == 1
    assert losses[99] == 3 * 0.99**100
    # A running mean over five lines stands at the last of them.
    steps, means = training.lines[1].get_data()
    assert steps[-1] == 200 and means[-1] == pytest.approx(np.mean(losses[-5:]), rel=1e-14)
    assert training.get_legend().get_texts()[0].get_text() == "running mean of 5"
    assert list(loss.lines[0].get_xdata()) == list(accuracy.lines[0].get_xdata()) == list(range(1, 11))
    assert list(loss.lines[0].get_ydata()) == [2 / step for step in range(20, 201, 20)]
    assert drawn.titles == ["", "best 0.01, epoch 10", f"best {1 - 0.5**180:.1%}, epoch 3"]


@pytest.mark.parametrize(("rate", "scale"), [(0.99, "linear"), (0.95, "log")])
def test_losses_over_a_factor_of_thirty_have_a_logarithmic_scale(
    rate: float, scale: str, drawn: Drawn, tmp_path: Path
) -> None:
    plots.plot_curves(tmp_path / "plot.png", [{"step": step, "loss": rate**step} for step in range(100)])
    assert drawn.axes[0].get_yscale() == scale


def test_batches_show_each_image_above_its_augmentation(drawn: Drawn, tmp_path: Path) -> None:
    before, after = photographs(11), [255 - image for image in photographs(11)]
    plots.plot_batches(tmp_path / "plot.png", before, after, names(11))
    grid = np.array(drawn.axes).reshape(4, 8)
    for i in range(11):
        row, column = 2 * (i // 8), i % 8
        assert (grid[row, column].images[0].get_array() == before[i]).all()
        assert (grid[row + 1, column].images[0].get_array() == after[i]).all()
        assert grid[row, column].get_title()[:12] == names(11)[i][:12]
    assert not any(axes.images or axes.axison for axes in grid[2:, 3:].flat)


def test_predictions_say_what_is_wrong_in_words_too(drawn: Drawn, tmp_path: Path) -> None:
    images, _, _, _, labels = predicted(3)
    plots.plot_predictions(tmp_path / "plot.png", images, [1, 4, 3], [1, 0, 3], [0.984, 0.5, 1], labels)
    assert drawn.titles == [
        "✓ 98% ph\U0001f34f1",
        "✗ 50% strawberry_shortcake0\nis strawberry_shortcake4",
        "✓ 100% $\\x$3",
    ]
    assert [axes.title.get_color() for axes in drawn.axes] == [plots.BLUE, plots.VERMILLION, plots.BLUE]
    for axes, image in zip(drawn.axes, images, strict=True):
        assert (axes.images[0].get_array() == image).all()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_lies_over_its_own_image(heads: int, drawn: Drawn, tmp_path: Path) -> None:
    images, maps = photographs(3), MAPS[:, :heads]
    plots.plot_attention_maps(tmp_path / "plot.png", images, maps)
    grid = np.array(drawn.axes).reshape(3, -1)
    assert grid.shape[1] == (2 if heads == 1 else 6)
    for image, each, row in zip(images, maps, grid, strict=True):
        assert (row[0].images[0].get_array() == image).all()
        for axes, values in zip(row[1:], [each.mean(0), *each], strict=False):
            below, above = axes.images
            dark = below.get_array().astype(float)
            # Grey, at most three fifths as bright as the photograph, and cut to whole numbers.
            assert (dark == dark[..., :1]).all()
            assert np.abs(dark[..., 0] - 0.6 * image.mean(-1)).max() < 1
            spread = (values.astype(np.float64) - values.min()) / (values.max() - values.min())
            # Differences of float32 values, in float64 or float32.
            np.testing.assert_allclose(above.get_array(), spread, rtol=0, atol=2**-22)
            # No colour at the least value, and most at the largest.
            assert above.get_alpha().min() == 0 and above.get_alpha().max() == 0.8
            assert np.ptp(above.get_array() * 0.8 - above.get_alpha()) < 1e-15
            assert above.get_extent() == below.get_extent()
    shown = ["attention"] if heads == 1 else ["mean of heads", "head 0", "head 1", "head 2", "head 3"]
    assert drawn.titles[: grid.shape[1]] == ["image", *shown]


def test_a_map_that_is_the_same_everywhere_shows_nothing(drawn: Drawn, tmp_path: Path) -> None:
    plots.plot_attention_maps(tmp_path / "plot.png", photographs(1), np.full((1, 1, 3, 4), 0.1, np.float32))
    assert not drawn.axes[1].images[1].get_alpha().any()


def test_a_confusion_matrix_has_truth_in_rows_counts_in_cells(drawn: Drawn, tmp_path: Path) -> None:
    evaluation = Evaluation(np.array([[7, 0, 1], [0, 0, 0], [3, 1, 0]]), 1.0)
    plots.plot_confusion(tmp_path / "plot.png", evaluation, ["a", "b", "c"])
    axes = drawn.axes[0]
    counts = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "7", (2, 0): "1", (0, 2): "3", (1, 2): "1"}
    shares = axes.images[0].get_array()
    assert shares[0].tolist() == [0.875, 0, 0.125] and shares.mask[1].all()
    assert axes.get_title() == "58.3% of 12 images"
    for axis, label in ((axes.xaxis, "predicted"), (axes.yaxis, "true")):
        assert axis.get_label_text() == label
        assert [text.get_text() for text in axis.get_ticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "preprocessor",
    [
        None,
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_rescale": False, "image_mean": 127.5, "image_std": 50},
    ],
)
def test_preprocessed_images_become_visible_as_they_were(preprocessor: dict[str, Any] | None) -> None:
    images = np.stack(photographs(2))
    config = ViTConfig(image_size=(24, 32), patch_size=8, preprocessor=preprocessor)
    shown = plots.make_visible(preprocess([Image.fromarray(image) for image in images], config), config)
    assert shown.dtype == np.uint8
    assert (shown == images).all()


@pytest.mark.parametrize(("owner", "name"), [(Figure, "savefig"), (os, "replace")])
def test_a_plot_that_cannot_be_written_leaves_the_earlier_one(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plot.png"
    plots.plot_schedule(path, [1, 0])
    before = path.read_bytes()

    def half(_: Any, file: Path, **options: Any) -> None:
        if owner is Figure:
            file.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, half)
    with pytest.raises(
        InputError, match=r"plot.png: it cannot be written \(No space left on device\): give another place$"
    ):
        plots.plot_schedule(path, [0, 1])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plot.png"]


def test_matplotlib_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    for plot, arguments in PLOTS.values():
        with pytest.raises(InputError, match=r"^plots need matplotlib: pip install 'vit-ref\[finetune\]'$"):
            plot(tmp_path / "plot.png", *arguments)


def test_a_run_whose_plots_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome: Any = SimpleNamespace(directory=tmp_path / "model")
    require_plots(tmp_path / "new")
    require_plots(tmp_path)
    (tmp_path / "plots").mkdir()
    require_plots(tmp_path)
    assert os.listdir(tmp_path) == ["plots"]
    (tmp_path / "plots").rmdir()
    for make in (Path.touch, lambda path: path.symlink_to("nowhere")):
        make(tmp_path / "plots")
        with pytest.raises(
            InputError, match="plots: it is not a directory, and the plots need it: move it away, or give an"
        ):
            require_plots(tmp_path)
        with pytest.raises(
            InputError, match=r"plots: it cannot be made \(File exists\): mend that, and continue with --resume"
        ):
            illustrate(outcome, None, None, Recipe())
        with monkeypatch.context() as another:
            another.setattr("jax.process_index", lambda: 1)
            require_plots(tmp_path)  # this process draws nothing
        (tmp_path / "plots").unlink()
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"^drawing plots needs matplotlib: pip install 'vit-ref\[finetune\]'$"):
        require_plots(tmp_path)


def test_importing_stays_light_and_pyplot_is_never_loaded(tmp_path: Path) -> None:
    code = """
import sys
from vit_ref.finetune import attention, metrics, plots, prediction
print(sorted({"matplotlib", "PIL", "tensorboardX", "transformers"} & set(sys.modules)))
plots.plot_schedule(sys.argv[1], [0, 1])
print("matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "plot.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\nTrue False\n"
