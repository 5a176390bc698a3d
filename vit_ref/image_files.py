"""The image files of a directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from vit_ref.errors import InputError

# Pillow recognises these formats but cannot decode them.
_RECOGNISED_ONLY = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})


class Files(NamedTuple):
    """Files below a directory, without hidden ones. Each list is sorted.

    Attributes:
      images: files with a suffix that Pillow reads, broken links among them.
      others: all other files.
    """

    images: list[Path]
    others: list[Path]


def require_pillow() -> None:
    """Checks that Pillow is installed.

    Raises:
      InputError: Pillow is missing.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise InputError("reading images needs Pillow: pip install 'vit-ref[images]'") from None


def suffixes() -> frozenset[str]:
    """Returns the suffixes of the images that Pillow and its registered plug-ins read, in lower case.

    Raises:
      InputError: Pillow is missing.
    """
    require_pillow()
    from PIL import Image

    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _RECOGNISED_ONLY
    )


def find(directory: Path) -> Files:
    """Lists the files below a directory.

    Raises:
      InputError: Pillow is missing.
    """
    known, files = suffixes(), Files([], [])
    for path in sorted(directory.rglob("*")):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in known:
            files.images.append(path)
        elif not path.is_dir():
            files.others.append(path)
    return files


def counted(files: Iterable[PurePath | str]) -> str:
    """Counts files in all and by suffix, as in "3 files (2 .heic, 1 .txt)"."""
    by_suffix = Counter(PurePath(file).suffix.lower() or "without suffix" for file in files)
    number = by_suffix.total()
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(by_suffix.items()))
    return f"{number} {'file' if number == 1 else 'files'}" + (f" ({kinds})" if kinds else "")
