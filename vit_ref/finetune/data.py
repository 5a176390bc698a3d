"""Labelled images to train on: generated ones, a directory with one folder per class, or a data set of the hub."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from vit_ref import image_files
from vit_ref.errors import InputError
from vit_ref.extras import extra
from vit_ref.files import require_local
from vit_ref.preprocessing import read_image

if TYPE_CHECKING:
    from PIL import Image

# The folders that may hold a split of a directory. The first one that exists is used.
_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid", "test")}
# If a directory has no validation images of its own, one in this many of its training images becomes one.
_HELD_OUT = 5
# The greatest number of unreadable images that a message names.
_NAMED = 5


class Photograph(NamedTuple):
    """One labelled image.

    Attributes:
      image: the image, upright and RGB.
      label: index into `ImageDataset.classes`.
      name: the file, or the row in a data set of the hub.
    """

    image: Image.Image
    label: int
    name: str


class _Sources(Protocol):
    """Row -> anything that `vit_ref.preprocessing.read_image` reads, or None for a missing image."""

    def __getitem__(self, row: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images, each decoded when it is read. Worker processes get a pickled copy of the object.

    Attributes:
      classes: names of the classes, in the order of the labels.
      names: names of the images.
      labels: class ids (N,), int64.
      rows: index of each image in `sources`, (N,), int64.
      sources: the undecoded images.
      bad: the images that cannot be read and were left out, each with the reason.
      others: files in the image folders whose suffix is not that of an image.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    sources: _Sources = dataclasses.field(repr=False)
    bad: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Photograph:
        name, source = self.names[index], self.sources[int(self.rows[index])]
        if source is None:
            raise InputError(f"{name}: the data set has no image there: remove the row")
        return Photograph(read_image(source, name), int(self.labels[index]), name)


def open_dataset(
    source: str | os.PathLike[str] | None,
    split: str,
    *,
    classes: int | Sequence[str] | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> ImageDataset:
    """Opens the images of one split. It decodes each of them once, to find unreadable images before the training.

    Args:
      source: one of

        - None: coloured shapes on grey noise, 64 by 64 pixels, of 4 classes. They are generated, and always the same.
        - a directory with `train/CLASS/*` and `validation/CLASS/*` (or `val`, `valid`, `test`), or only `CLASS/*`. If
          it has no validation images, a hash of the file name selects a fifth of each class.
        - a data set that `datasets` loads: the hub id of one, such as "ethz/food101", or a directory of parquet files.
          It needs a column of images and one of class labels; of several, the first counts.
        - a directory that `save_to_disk` of `datasets` wrote, of one data set or of several splits, with such columns.
      split: "train" or "validation". A data set of `datasets` takes any split that it knows, such as "train[:5000]".
      classes: the number of classes to keep, from the first of the split, or the names of those to keep, in order.
        Open the validation images with the `classes` of the training images.
      on_bad: "error" to refuse images that cannot be read, "skip" to leave them out.

    Raises:
      InputError: the data set, split or class does not exist, an image cannot be read, or a package is missing.
    """
    extra("PIL", "reading images")
    if on_bad not in ("error", "skip"):
        raise InputError(f"on_bad is {on_bad!r}: give 'error' or 'skip'")
    if source is None:
        dataset, where = _shapes(split), "the built-in images"
    else:
        require_local(source, "data")
        path, where = Path(source), f"{os.fspath(source)} ({split})"
        if _is_table(path) or not path.is_dir():
            dataset = _from_table(os.fspath(source), split)
        else:
            dataset = _from_folders(path, split)
    return _readable(_with_classes(dataset, classes, where), on_bad, where)


def _kept(dataset: ImageDataset, keep: NDArray[np.bool_], **changes: Any) -> ImageDataset:
    """Returns the data set of the images for which `keep` is true."""
    changes = {"labels": dataset.labels[keep], **changes}
    names = tuple(name for name, kept in zip(dataset.names, keep, strict=True) if kept)
    return dataclasses.replace(dataset, names=names, rows=dataset.rows[keep], **changes)


def _with_classes(dataset: ImageDataset, classes: int | Sequence[str] | None, where: str) -> ImageDataset:
    if isinstance(classes, int):
        present = np.unique(dataset.labels)
        if not 1 <= classes <= len(present):
            raise InputError(f"classes is {classes}: there are {len(present)} in {where}: give 1 to {len(present)}")
        chosen = [dataset.classes[label] for label in present[:classes]]
    else:
        chosen = list(dataset.classes if classes is None else classes)
    unknown = [name for name in chosen if name not in dataset.classes]
    if unknown:
        raise InputError(
            f"no class {', '.join(map(repr, unknown))} in {where}: give some of {', '.join(dataset.classes)}"
        )
    label_of = np.full(len(dataset.classes), -1)
    label_of[[dataset.classes.index(name) for name in chosen]] = range(len(chosen))
    labels = label_of[dataset.labels]
    return _kept(dataset, labels >= 0, labels=labels[labels >= 0], classes=tuple(chosen))


def _readable(dataset: ImageDataset, on_bad: str, where: str) -> ImageDataset:
    def fault(index: int) -> str | None:
        try:
            dataset[index]
        except InputError as error:
            return str(error)
        return None

    hidden = not sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden)
    # Pillow decodes without Python's lock, so threads help.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        count = len(dataset)
        checked, said = pool.map(fault, range(count)), f"reading {escape(where)}"
        faults = list(bar.track(checked, count, description=said))
    bad = tuple(reason for reason in faults if reason is not None)
    if bad and on_bad == "error":
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise InputError(
            f"{where}: {len(bad)} of {count} images cannot be read: {'; '.join(bad[:_NAMED])}{more}: mend them, or skip"
            " them (--bad-images skip, on_bad='skip')"
        )
    if len(bad) == count:
        raise InputError(f"{where}: none of the images can be read: give readable images")
    return _kept(dataset, np.array([reason is None for reason in faults]), bad=bad)


# Class -> (colour, whether the shape covers a point). The coordinates start in its middle, and reach 1 at its edge.
_SHAPES: dict[str, tuple[tuple[int, int, int], Callable[[NDArray, NDArray], NDArray]]] = {
    "red circle": ((200, 60, 60), lambda y, x: y**2 + x**2 < 1),
    "green square": ((60, 170, 70), lambda y, x: np.maximum(abs(y), abs(x)) < 0.85),
    "blue triangle": ((60, 80, 200), lambda y, x: (y < 0.9) & (2 * abs(x) < y + 1)),
    "yellow cross": (
        (200, 180, 50),
        lambda y, x: (np.minimum(abs(y), abs(x)) < 0.35) & (np.maximum(abs(y), abs(x)) < 1),
    ),
}
# Split -> (seed, number of images)
_SHAPES_OF = {"train": (0, 512), "validation": (1, 128)}


@dataclasses.dataclass(frozen=True)
class _Drawings:
    """Coloured shapes on grey noise, with random position, size and shade. The classes take turns."""

    seed: int
    side: int = 64

    def __getitem__(self, row: int, /) -> Image.Image:
        from PIL import Image

        rng = np.random.default_rng((self.seed, row))
        colour, shape = list(_SHAPES.values())[row % len(_SHAPES)]
        radius = rng.uniform(0.2, 0.4) * self.side
        middle = rng.uniform(radius, self.side - radius, size=2)
        y, x = (np.arange(self.side) - middle[:, None] + 0.5) / radius
        inside = shape(y[:, None], x[None, :])[..., None]
        shade = colour + rng.uniform(-40, 40, size=3)
        pixels = np.where(inside, shade, rng.uniform(70, 180)) + rng.uniform(-50, 50, (self.side, self.side, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _shapes(split: str) -> ImageDataset:
    if split not in _SHAPES_OF:
        raise InputError(f"split is {split!r}: give {' or '.join(_SHAPES_OF)}, the splits of the built-in images")
    seed, count = _SHAPES_OF[split]
    rows = np.arange(count)
    names = tuple(f"{split} image {row}" for row in rows)
    return ImageDataset(tuple(_SHAPES), names, rows % len(_SHAPES), rows, _Drawings(seed))


def _from_folders(directory: Path, split: str) -> ImageDataset:
    if split not in _FOLDERS:
        raise InputError(f"split is {split!r}: give {' or '.join(_FOLDERS)}, the splits of a directory")
    training = directory / "train" if (directory / "train").is_dir() else directory
    apart = [directory / name for name in _FOLDERS["validation"] if (directory / name).is_dir()]
    if training == directory and apart:
        raise InputError(f"{apart[0]}: no {directory / 'train'} exists beside it: put the training images there")
    classes = _folders(training)
    files: list[Path] = []
    others: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if split == "validation" and apart:
            images, left_out = image_files.find(apart[0] / name)
        else:
            images, left_out = image_files.find(training / name)
            if not images:
                raise InputError(
                    f"{training / name}: it holds no image, but {image_files.counted(left_out)}: put images there, or"
                    " remove the folder"
                )
            if not apart:
                images = _part(images, split)
        files += images
        others += left_out
        labels += [label] * len(images)
    if apart:
        surplus = [name for name in _folders(apart[0]) if name not in classes]
        if surplus:
            raise InputError(f"{apart[0] / surplus[0]}: {training} has no such class: add it there, or remove it here")
    if not files:
        raise InputError(f"{apart[0] if apart else directory}: it holds no {split} images: put some there")
    names = tuple(map(os.fspath, files))
    return ImageDataset(
        tuple(classes), names, np.array(labels), np.arange(len(names)), names, others=tuple(map(os.fspath, others))
    )


def _folders(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise InputError(f"{directory}: it holds no folders: give a directory with one folder of images for each class")
    for name in names:
        # The name goes into a JSON file.
        if name != name.encode(errors="replace").decode():
            raise InputError(f"{directory}: the name of the class {name!r} is not valid text: rename the folder")
    return names


def _part(files: Sequence[Path], split: str) -> list[Path]:
    """Returns a split of a class. It depends on file names alone, and not on the directory or the file system."""
    by_hash = sorted(files, key=lambda path: (zlib.crc32(os.fsencode(path.name)), path))
    held_out = set(by_hash[: max(1, len(files) // _HELD_OUT)] if len(files) > 1 else ())
    return [path for path in files if (path in held_out) == (split == "validation")]


@dataclasses.dataclass(frozen=True)
class _Column:
    """Undecoded images of a table of `datasets`."""

    table: Any
    column: str

    def __getitem__(self, row: int, /) -> io.BytesIO | str | None:
        image = self.table[row][self.column]
        if image is None:
            return None
        return image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])


def _from_table(source: str, split: str) -> ImageDataset:
    datasets = extra("datasets", f"{source}, which is not a directory of images,")
    table = _loaded(datasets, source, split)
    features = table.features
    images, label = (
        next((name for name, feature in features.items() if isinstance(feature, kind)), "")
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if not images or not label:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise InputError(f"{source}: its columns are {columns}: give one of type Image and one of type ClassLabel")
    labels = np.array(table.select_columns(label)[:][label], np.float64)
    if np.isnan(labels).any() or (labels < 0).any():
        row = int(np.argmax(np.isnan(labels) | (labels < 0)))
        raise InputError(f"{source} ({split}): row {row} has no {label}: give a split in which every row has one")
    names = tuple(f"{source} ({split}), row {row}" for row in range(len(table)))
    # Undecoded, because this package's reader follows the orientation and reports what is wrong.
    undecoded = table.select_columns(images).cast_column(images, datasets.Image(decode=False))
    return ImageDataset(
        tuple(features[label].names), names, labels.astype(np.int64), np.arange(len(names)), _Column(undecoded, images)
    )


# Files that `save_to_disk` writes beside the rows: for several splits, and for one data set.
_SAVED_SPLITS, _SAVED = "dataset_dict.json", "state.json"


def _is_table(directory: Path) -> bool:
    """Tells whether `datasets` reads the directory: a copy from the hub, or one that `save_to_disk` wrote."""
    patterns = ("*.parquet", "data/*.parquet", _SAVED_SPLITS, _SAVED)
    return any(any(directory.glob(pattern)) for pattern in patterns)


def _loaded(datasets: Any, source: str, split: str) -> Any:
    shown = datasets.utils.logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Without a network both log each of many tries. The error below says the same once.
    levels = {logger: logger.level for logger in map(logging.getLogger, ("datasets", "huggingface_hub"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        if any((Path(source) / name).is_file() for name in (_SAVED_SPLITS, _SAVED)):
            return _part_of_saved(datasets, source, split)
        return datasets.load_dataset(source, split=split)
    except InputError:
        raise
    # Such as a repository that is missing or private, a missing split, a script, no network, or damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source} ({split}): it is not a directory of images, and datasets cannot load it ({reason}): give another"
        ) from None
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _part_of_saved(datasets: Any, source: str, split: str) -> Any:
    """Returns a split, or a slice of one, that `save_to_disk` wrote. `load_from_disk` itself takes no split."""
    saved = datasets.load_from_disk(source)
    if not isinstance(saved, datasets.DatasetDict):
        # `datasets` uses this name for a data set without a split.
        saved = {str(saved.split or "train"): saved}
    lengths = {name: len(table) for name, table in saved.items()}
    if any(part.partition("[")[0] not in lengths for part in split.split("+")):
        first = next(iter(lengths))
        raise InputError(
            f"{source}: split is {split!r}, and it has only {', '.join(lengths)}: give one of these, or a slice of one,"
            f" such as {first}[:80%] to train and {first}[80%:] to validate (--train-split, --validation-split)"
        )
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    tables = [saved[part.splitname].select(range(lengths[part.splitname])[part.from_ : part.to]) for part in parts]
    return datasets.concatenate_datasets(tables)
