"""Are the images of a data set complete, labelled by folder or column, and their faults found at the start?"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_ref.errors import InputError
from vit_ref.finetune.data import ImageDataset, open_dataset

# Class -> the red of its images. File `k` has `k` for its green.
RED = {"ant": 10, "bee": 90, "cat": 170}


def save(file: Path, red: int, green: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (7, 5), (red, green, 0)).save(file)


def fill(directory: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for k in range(count):
            save(directory / name / f"{k}.png", RED[name], k)
    return directory


def seen(dataset: ImageDataset) -> list[tuple[str, int, int]]:
    """Returns (class by the label, red, green) of every image."""
    colours = [(photograph.label, photograph.image.getpixel((3, 2))) for photograph in dataset]
    return [(dataset.classes[label], red, green) for label, (red, green, _) in colours]


def expected(counts: dict[str, int]) -> list[tuple[str, int, int]]:
    return [(name, RED[name], k) for name, count in counts.items() for k in range(count)]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["validation", "val", "valid", "test"])
def test_folders_are_classes(tmp_path: Path, folder: str) -> None:
    training, validation = {"ant": 3, "bee": 2, "cat": 4}, {"ant": 1, "bee": 2, "cat": 1}
    fill(tmp_path / "train", training)
    fill(tmp_path / folder, validation)
    assert seen(open_dataset(tmp_path, "train")) == expected(training)
    assert seen(open_dataset(os.fspath(tmp_path), "validation")) == expected(validation)


def test_a_class_without_validation_images_keeps_its_label(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"ant": 1, "bee": 1, "cat": 1})
    fill(tmp_path / "val", {"cat": 2})
    dataset = open_dataset(tmp_path, "validation")
    assert dataset.classes == ("ant", "bee", "cat")
    assert seen(dataset) == expected({"cat": 2})


@pytest.mark.parametrize("below", [".", "train"])
def test_a_fifth_of_each_class_is_held_out_without_validation(tmp_path: Path, below: str) -> None:
    counts = {"ant": 20, "bee": 11, "cat": 2}
    fill(tmp_path / below, counts)
    training, validation = (seen(open_dataset(tmp_path, split)) for split in ("train", "validation"))
    assert sorted(training + validation) == sorted(expected(counts))
    assert [sum(name == each for name, _, _ in validation) for each in counts] == [4, 2, 1]


def test_what_is_held_out_depends_on_the_names_alone(tmp_path: Path) -> None:
    here, there = fill(tmp_path / "here", {"ant": 30}), tmp_path / "elsewhere"
    for k in reversed(range(30)):
        save(there / "ant" / f"{k}.png", RED["ant"], k)
    held_out = seen(open_dataset(here, "validation"))
    assert held_out == seen(open_dataset(there, "validation"))
    # Not the first in the order of names, because cameras number the photographs of one scene in sequence.
    assert [green for _, _, green in held_out] != sorted(range(30), key=str)[:6]


def test_other_files_and_hidden_ones_are_no_images(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"ant": 2})
    fill(tmp_path / "val", {"ant": 2})
    for name in ("notes.txt", ".0.png", "Thumbs.db"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"no image")
    (tmp_path / "train" / ".cache").mkdir()
    dataset = open_dataset(tmp_path, "train")
    assert seen(dataset) == expected({"ant": 2})
    assert dataset.others == tuple(os.fspath(tmp_path / "train" / "ant" / name) for name in ("Thumbs.db", "notes.txt"))


@pytest.mark.parametrize(
    ("classes", "kept"), [(2, ("ant", "bee")), (("cat", "ant"), ("cat", "ant")), (None, ("ant", "bee", "cat"))]
)
def test_the_first_classes_or_the_named_ones_are_kept(tmp_path: Path, classes: Any, kept: tuple[str, ...]) -> None:
    counts = {"ant": 2, "bee": 1, "cat": 3}
    for folder in ("train", "val"):
        fill(tmp_path / folder, counts)
    dataset = open_dataset(tmp_path, "train", classes=classes)
    assert dataset.classes == kept
    assert sorted(seen(dataset)) == sorted(expected({name: counts[name] for name in kept}))


def test_images_come_upright_and_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.new("L", (9, 4)).save(tmp_path / "train" / "ant" / "0.jpg", exif=exif)
    fill(tmp_path / "val", {"ant": 1})
    image = open_dataset(tmp_path, "train")[0].image
    assert (image.mode, image.size) == ("RGB", (4, 9))


def spoil(directory: Path) -> list[str]:
    """Makes four faulty files, and returns their names."""
    files = [directory / "ant" / f"{name}.jpg" for name in ("cut", "empty", "nowhere", "text")]
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(files[0])
    files[0].write_bytes(files[0].read_bytes()[:-300])
    files[1].write_bytes(b"")
    files[2].symlink_to(directory / "gone.jpg")
    files[3].write_text("no image")
    return [os.fspath(file) for file in files]


def test_unreadable_images_are_counted_and_named_up_front(tmp_path: Path) -> None:
    fill(tmp_path / "val", {"ant": 1})
    names = spoil(fill(tmp_path / "train", {"ant": 3}))
    message = refusal(lambda: open_dataset(tmp_path, "train"))
    assert "4 of 7 images" in message
    assert all(name in message for name in names)


def test_images_that_cannot_be_read_are_left_out_by_choice(tmp_path: Path) -> None:
    fill(tmp_path / "val", {"ant": 1})
    names = spoil(fill(tmp_path / "train", {"ant": 3, "bee": 2}))
    dataset = open_dataset(tmp_path, "train", on_bad="skip")
    assert seen(dataset) == expected({"ant": 3, "bee": 2})
    assert [line.split(": ")[0] for line in dataset.bad] == names


def test_many_unreadable_images_make_a_short_message(tmp_path: Path) -> None:
    fill(tmp_path / "val", {"ant": 1})
    fill(tmp_path / "train", {"ant": 30})
    for file in (tmp_path / "train" / "ant").iterdir():
        file.write_bytes(b"")
    message = refusal(lambda: open_dataset(tmp_path, "train"))
    assert "30 of 30 images" in message and "and 25 more" in message and message.count("not a readable image") == 5
    assert "none of the images can be read" in refusal(lambda: open_dataset(tmp_path, "train", on_bad="skip"))


def without(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name)


def emptied(name: str) -> Callable[[Path], None]:
    return lambda root: [path.unlink() for path in (root / name).iterdir()] and None


@pytest.mark.parametrize(
    ("split", "harm", "said"),
    [
        ("train", without("train/ant"), "{root}/val/ant: {root}/train has no such class"),
        ("train", without("train"), "no {root}/train exists beside it"),
        ("train", emptied("train/cat"), "train/cat: it holds no image, but 0 files"),
        ("validation", emptied("val/ant"), "{root}/val: it holds no validation images"),
        ("test", lambda root: None, "split is 'test'"),
    ],
)
def test_folders_that_make_no_data_set_are_refused(
    tmp_path: Path, split: str, harm: Callable[[Path], None], said: str
) -> None:
    fill(tmp_path / "train", {"ant": 1, "cat": 1})
    fill(tmp_path / "val", {"ant": 1})
    harm(tmp_path)
    assert said.format(root=tmp_path) in refusal(lambda: open_dataset(tmp_path, split))


def test_names_that_are_no_text_are_refused_only_for_classes(tmp_path: Path) -> None:
    fill(tmp_path, {"ant": 3, "bee": 3})
    os.rename(tmp_path / "ant" / "0.png", os.fsencode(tmp_path / "ant") + b"/caf\xe9.png")
    assert len(open_dataset(tmp_path, "train")) == 4
    os.rename(tmp_path / "bee", os.fsencode(tmp_path) + b"/caf\xe9")
    assert r"the class 'caf\udce9' is not valid text: rename the folder" in refusal(
        lambda: open_dataset(tmp_path, "train")
    )


def test_a_directory_without_folders_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "0.png", 1, 1)
    assert f"{tmp_path}: it holds no folders" in refusal(lambda: open_dataset(tmp_path, "train"))


def test_a_url_is_no_data_set() -> None:
    message = refusal(lambda: open_dataset("https://host/images.zip", "train"))
    assert message.startswith("data is https://host/images.zip: a URL is no path on this machine: give a local path")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "test"}, "split is 'test': give train or validation, the splits of the built-in images"),
        ({"classes": 5}, "classes is 5: there are 4 in the built-in images"),
        ({"classes": 0}, "classes is 0"),
        (
            {"classes": ("red circle", "bee")},
            "no class 'bee' in the built-in images: give some of red circle,",
        ),
        ({"on_bad": "ignore"}, "on_bad is 'ignore'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: open_dataset(None, **{"split": "train", **arguments}))


def test_built_in_images_are_reproducible_and_in_one_split_only() -> None:
    training, again, validation = (open_dataset(None, split) for split in ("train", "train", "validation"))
    pixels = [[photograph.image.tobytes() for photograph in dataset] for dataset in (training, again, validation)]
    assert pixels[0] == pixels[1]
    assert len({*pixels[0], *pixels[2]}) == len(training) + len(validation)
    for dataset in (training, validation):
        assert np.bincount(dataset.labels).tolist() == [len(dataset) // 4] * 4


def test_the_built_in_images_can_be_learnt() -> None:
    """Trains a linear model on four numbers a picture, which measure how far the middle's colour is from grey."""
    features = []
    for split in ("train", "validation"):
        dataset = open_dataset(None, split)
        colours = np.stack([np.asarray(photograph.image, float) for photograph in dataset])
        # The most colourful part is the shape, wherever it is.
        coarse = colours.reshape(len(dataset), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(dataset), 64, 3)
        grey = coarse - coarse.mean(-1, keepdims=True)
        strongest = np.abs(grey).sum(-1).argmax(1)
        features.append((np.c_[grey[range(len(dataset)), strongest], np.ones(len(dataset))], dataset.labels))
    (x, y), (x_new, y_new) = features
    weights, *_ = np.linalg.lstsq(x, np.eye(4)[y], rcond=None)
    # Chance would give 1/4.
    assert ((x_new @ weights).argmax(1) == y_new).mean() > 0.9


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package `datasets`, with its cache in a temporary directory."""
    package = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield package


def table_of(datasets: Any, rows: list[tuple[str | None, bytes | None]], **features: Any) -> Any:
    """Returns a table of (class, encoded image)."""
    names = list(RED)
    label = {**{name: k for k, name in enumerate(names)}, "?": -1}
    return datasets.Dataset.from_dict(
        {
            "number": list(range(len(rows))),
            "picture": [raw and {"bytes": raw, "path": None} for _, raw in rows],
            "species": [label.get(name) for name, _ in rows],
        },
        datasets.Features(
            {
                "number": datasets.Value("int32"),
                "picture": datasets.Image(),
                "species": datasets.ClassLabel(names=names),
                **features,
            }
        ),
    )


def parquet(datasets: Any, directory: Path, rows: list[tuple[str | None, bytes | None]], **features: Any) -> Path:
    """Makes a directory as the hub has it."""
    (directory / "data").mkdir(parents=True)
    table_of(datasets, rows, **features).to_parquet(directory / "data" / "train-00000-of-00001.parquet")
    return directory


def encoded(tmp_path: Path, name: str, green: int) -> bytes:
    save(tmp_path / "one.png", RED[name], green)
    return (tmp_path / "one.png").read_bytes()


@pytest.fixture
def rows(tmp_path: Path) -> list[tuple[str | None, bytes | None]]:
    return [(name, encoded(tmp_path, name, k)) for k, name in enumerate(("cat", "ant", "cat", "bee", "ant"))]


ROWS = [("cat", RED["cat"], 0), ("ant", RED["ant"], 1), ("cat", RED["cat"], 2), ("bee", RED["bee"], 3)]


@pytest.mark.parametrize(
    ("split", "classes", "kept"),
    [
        ("train[:4]", None, ("ant", "bee", "cat")),
        ("train[:4]", 2, ("ant", "bee")),
        # The slice has no bee, so this keeps its first two classes.
        ("train[:3]", 2, ("ant", "cat")),
        ("train[:4]", ("cat", "ant"), ("cat", "ant")),
    ],
)
def test_a_data_set_of_datasets_is_read(
    tmp_path: Path, datasets: Any, rows: Any, split: str, classes: Any, kept: tuple[str, ...]
) -> None:
    dataset = open_dataset(parquet(datasets, tmp_path / "hub", rows), split, classes=classes)
    assert dataset.classes == kept
    among = ROWS[: int(split[-2])]
    assert seen(dataset) == [row for row in among if row[0] in kept]
    assert seen(pickle.loads(pickle.dumps(dataset))) == seen(dataset)


@pytest.mark.parametrize(
    ("splits", "split", "kept"),
    [
        (("train",), "train[:4]", ROWS),
        (("train",), "train[2:4]", ROWS[2:]),
        (("fit", "judge"), "judge", ROWS[:2]),
        (("fit", "judge"), "fit[2:4]+judge[:1]", [*ROWS[2:], ROWS[0]]),
    ],
)
def test_what_save_to_disk_wrote_is_read(
    tmp_path: Path, datasets: Any, rows: Any, splits: tuple[str, ...], split: str, kept: list
) -> None:
    table = table_of(datasets, rows)
    several = datasets.DatasetDict({name: table.select(range(5 if name == "fit" else 2)) for name in splits})
    (table if len(splits) == 1 else several).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(tmp_path / "saved", split)
    assert dataset.classes == tuple(RED)
    assert seen(dataset) == kept


def test_a_split_that_save_to_disk_did_not_write_is_one_line(tmp_path: Path, datasets: Any, rows: Any) -> None:
    table_of(datasets, rows).save_to_disk(tmp_path / "saved")
    assert refusal(lambda: open_dataset(tmp_path / "saved", "validation")) == (
        f"{tmp_path / 'saved'}: split is 'validation', and it has only train: give one of these, or a slice of one,"
        " such as train[:80%] to train and train[80%:] to validate (--train-split, --validation-split)"
    )


def test_missing_and_broken_images_are_reported_by_row(tmp_path: Path, datasets: Any, rows: Any) -> None:
    rows[1], rows[3] = ("ant", None), ("bee", b"no image")
    directory = parquet(datasets, tmp_path / "hub", rows)
    message = refusal(lambda: open_dataset(directory, "train"))
    assert (
        "2 of 5 images" in message
        and "row 1: the data set has no image" in message
        and "row 3: not a readable image" in message
    )
    dataset = open_dataset(directory, "train", on_bad="skip")
    assert seen(dataset) == [ROWS[0], ROWS[2], ("ant", RED["ant"], 4)]
    assert len(dataset.bad) == 2


@pytest.mark.parametrize("label", [None, "?"], ids=["null", "-1"])
def test_an_unlabelled_row_of_a_data_set_is_refused(
    tmp_path: Path, datasets: Any, rows: Any, label: str | None
) -> None:
    rows[2] = (label, rows[2][1])
    directory = parquet(datasets, tmp_path / "hub", rows)
    assert "row 2 has no species" in refusal(lambda: open_dataset(directory, "train"))


def test_a_data_set_without_class_labels_is_refused(tmp_path: Path, datasets: Any, rows: Any) -> None:
    directory = parquet(datasets, tmp_path / "hub", rows, species=datasets.Value("int64"))
    message = refusal(lambda: open_dataset(directory, "train"))
    assert "its columns are number (Value), picture (Image), species (Value): give one of type Image" in message


@pytest.mark.parametrize(("below", "split"), [("nowhere", "train"), ("hub", "validation")])
def test_what_datasets_cannot_load_is_one_line(
    tmp_path: Path, datasets: Any, rows: Any, below: str, split: str
) -> None:
    parquet(datasets, tmp_path / "hub", rows)
    message = refusal(lambda: open_dataset(tmp_path / below, split))
    assert message.startswith(
        f"{tmp_path / below} ({split}): it is not a directory of images, and datasets cannot load it ("
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_datasets_shows_its_progress_on_a_terminal_alone(
    terminal: bool, tmp_path: Path, datasets: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, logging = [], datasets.utils.logging
    logging.enable_progress_bar()
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (shown.append(logging.is_progress_bar_enabled()), load(*a, **k))[1]
    )
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal, write=len, flush=lambda: None))
    open_dataset(parquet(datasets, tmp_path / "hub", rows), "train")
    assert shown == [terminal] and logging.is_progress_bar_enabled()


@pytest.mark.hub
@pytest.mark.skipif("VIT_REF_HUB" not in os.environ, reason="needs the Hugging Face hub: set VIT_REF_HUB=1 to run it")
def test_a_data_set_of_the_hub_is_read() -> None:
    dataset = open_dataset("ethz/food101", "validation[:3]")
    assert len(dataset.classes) == 101 and dataset.classes[0] == "apple_pie"
    assert [photograph.image.mode for photograph in dataset] == ["RGB"] * 3
