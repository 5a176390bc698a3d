"""Is every image that Pillow reads found in a directory, and are the other files counted?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from vit_ref.errors import InputError
from vit_ref.image_files import counted, find, suffixes
from vit_ref.preprocessing import read_image
from vit_ref.verify import photographs

IMAGES = ("a.gif", "b.JFIF", "c.jpg", "d.png", "e.ppm", "f.tga", "g.webp", "below/h.jp2")


def fill(directory: Path) -> None:
    (directory / "below").mkdir()
    for name in IMAGES:
        # Pillow chooses the format by the suffix, in upper or lower case.
        Image.new("RGB", (4, 4), (200, 0, 0)).save(directory / name)
    for name in ("notes.txt", "photograph.heic", "film.mpg", "rows.h5", "LICENSE", "below/paper.pdf", ".d.png"):
        (directory / name).write_bytes(b"no image")


def test_what_pillow_reads_is_an_image_and_the_rest_is_not(tmp_path: Path) -> None:
    fill(tmp_path)
    found = find(tmp_path)
    assert found.images == sorted(tmp_path / name for name in IMAGES)
    assert [path.name for path in found.others] == [
        "LICENSE",
        "paper.pdf",
        "film.mpg",
        "notes.txt",
        "photograph.heic",
        "rows.h5",
    ]
    assert {read_image(path, path.name).size for path in found.images} == {(4, 4)}


def test_a_plug_in_adds_its_suffixes_when_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ".heic" not in suffixes()
    Image.registered_extensions()
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
    assert ".heic" in suffixes()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.heic", "b.txt", "c.HEIC"], "3 files (2 .heic, 1 .txt)"),
        (["LICENSE"], "1 file (1 without suffix)"),
        ([], "0 files"),
    ],
)
def test_files_are_counted_by_suffix(files: list[str], expected: str) -> None:
    assert counted(files) == expected


def test_photographs_are_found_whatever_their_suffix(tmp_path: Path) -> None:
    fill(tmp_path)
    assert photographs.find(tmp_path, 8) == sorted(tmp_path / name for name in IMAGES)


def test_a_directory_without_images_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(InputError) as caught:
        photographs.find(tmp_path, 4)
    assert (
        str(caught.value) == f"{tmp_path}: it holds no image, but 1 file (1 .heic): give a directory with photographs"
    )


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"^reading images needs Pillow: pip install 'vit-ref\[images\]'$"):
        find(tmp_path)
