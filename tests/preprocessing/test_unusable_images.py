"""Does an image that cannot be preprocessed end in one clear line, whatever is wrong with it?"""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vit_ref.errors import ConfigError, InputError
from vit_ref.preprocessing import preprocess
from vit_ref.verify import photographs

Picture = Callable[..., NDArray]


def refusal(call: Callable[[], object], error: type[Exception] = InputError) -> str:
    """Returns the message of the error, which has to be one line."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _bomb(bmp: bytes) -> bytes:
    """Makes a file whose header says 60,000 by 60,000 pixels."""
    return bmp[:18] + (60_000).to_bytes(4, "little") * 2 + bmp[26:]


@pytest.mark.parametrize(
    ("kind", "damage", "reason"),
    [
        ("PNG", lambda raw: b"", "cannot identify image file"),
        ("PNG", lambda raw: b"no image", "cannot identify image file"),
        ("PNG", lambda raw: raw[: len(raw) // 2], "truncated"),
        ("JPEG", lambda raw: raw[: len(raw) // 2], "truncated"),
        # The length of the image data. Pillow raises a SyntaxError for it.
        ("PNG", lambda raw: raw.replace(b"IDAT", b"ID\0T"), ""),
        ("BMP", _bomb, "3600000000 pixels"),
    ],
)
def test_damaged_files_are_named_with_the_reason(
    kind: str, damage: Callable[[bytes], bytes], reason: str, picture: Picture, asks_for, tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(damage(encoded(Image.fromarray(picture(37, 53)).convert("RGB"), kind)))
    message = refusal(lambda: preprocess([path], asks_for({})))
    assert re.match(rf"{re.escape(str(path))}: not a readable image \(.*{reason}.*\)$", message)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_no_damage_ends_in_another_error(kind: str, picture: Picture, asks_for, tmp_path: Path) -> None:
    """Damages files. Pillow's decoders then raise OSError, SyntaxError, ValueError, TypeError and others."""
    rng, config = np.random.default_rng(0), asks_for({})
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.fromarray(picture(9, 11)).convert("RGB"), kind, exif=exif)
    path, refused = tmp_path / "damaged", 0
    for _ in range(150):
        raw = bytearray(whole)
        for place in rng.integers(0, len(raw), 3):
            raw[place] = rng.integers(0, 256)
        path.write_bytes(raw[: rng.integers(len(raw) // 2, len(raw))] if rng.random() < 0.3 else raw)
        try:
            assert preprocess([path], config).shape == (1, 10, 14, 3)
        except InputError:
            refused += 1
    assert refused > 15


def test_files_that_are_not_there_are_named(asks_for, tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    message = refusal(lambda: preprocess([missing], asks_for({})))
    assert message == f"{missing}: not a readable image (No such file or directory)"
    assert refusal(lambda: preprocess([str(tmp_path)], asks_for({}))).startswith(f"{tmp_path}: not a readable image (")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_grey_is_refused(mode: str, asks_for, tmp_path: Path) -> None:
    image = Image.new(mode, (5, 4), 300)
    image.save(tmp_path / "deep.tif")
    advice = f"32-bit grey (mode {mode}) has no known white: save it as 8-bit grey"
    assert refusal(lambda: preprocess([tmp_path / "deep.tif"], asks_for({}))) == f"{tmp_path / 'deep.tif'}: {advice}"
    assert refusal(lambda: preprocess([Image.new("L", (5, 4)), image], asks_for({}))) == f"image 1: {advice}"


def test_images_of_two_sizes_need_resizing(asks_for) -> None:
    images = [Image.new("RGB", (5, 4)), Image.new("RGB", (4, 5))]
    message = refusal(lambda: preprocess(images, asks_for({"do_resize": False})))
    assert (
        message
        == "image 1: it has 5x4 pixels, the first image has 4x5, and do_resize is false: give images of one size"
    )


def test_no_images_are_refused(asks_for) -> None:
    assert refusal(lambda: preprocess([], asks_for({}))) == "there are no images: give at least one"


UNKNOWN_RESAMPLE = "give one of 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming"
INCOMPLETE_SIZE = "give a height and a width in pixels; shortest_edge does not fit a ViT"
THREE_NUMBERS = "give a number, or one for each of red, green and blue"
NO_PADDING = "remove it, because a ViT's images are never padded"


@pytest.mark.parametrize(
    ("name", "value", "advice", "reference_too"),
    [
        ("resample", 99, UNKNOWN_RESAMPLE, True),
        ("resample", -1, UNKNOWN_RESAMPLE, True),
        ("resample", None, UNKNOWN_RESAMPLE, True),
        ("resample", "bicubic", UNKNOWN_RESAMPLE, True),
        ("resample", True, UNKNOWN_RESAMPLE, False),
        ("resample", 2.0, UNKNOWN_RESAMPLE, True),
        ("size", {"height": 8}, INCOMPLETE_SIZE, True),
        ("size", {}, INCOMPLETE_SIZE, True),
        ("size", {"shortest_edge": 8}, INCOMPLETE_SIZE, True),
        ("size", {"height": 8, "width": 8, "longest_edge": 9}, INCOMPLETE_SIZE, True),
        ("size", [8], INCOMPLETE_SIZE, True),
        ("size", 0, INCOMPLETE_SIZE, True),
        ("size", {"height": 8, "width": -8}, INCOMPLETE_SIZE, True),
        ("size", 8.5, INCOMPLETE_SIZE, True),
        ("size", "8", INCOMPLETE_SIZE, True),
        ("size", True, INCOMPLETE_SIZE, False),
        ("size", 2**31, INCOMPLETE_SIZE, None),
        ("image_mean", [0.5, 0.5], THREE_NUMBERS, True),
        ("image_mean", ["a", "b", "c"], THREE_NUMBERS, True),
        ("image_std", [0.5, float("nan"), 0.5], THREE_NUMBERS, False),
        ("image_mean", 1e39, THREE_NUMBERS, None),
        ("image_std", [1e300, 1, 1], THREE_NUMBERS, None),
        ("rescale_factor", 10**400, "give a number", None),
        ("image_std", [0.5, 0, 0.5], "give no zero, because pixels are divided by it", False),
        ("rescale_factor", None, "give a number", True),
        ("rescale_factor", "1/255", "give a number", True),
        ("do_resize", "yes", "give true or false", False),
        ("do_rescale", "null", "give true or false", False),
        ("do_normalize", 1, "give true or false", False),
        ("do_center_crop", "yes", "give true or false", False),
        ("do_pad", True, NO_PADDING, False),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the reference divides by zero
def test_settings_that_mean_nothing_are_refused(
    name: str, value: Any, advice: str, reference_too: bool | None, asks_for, by_reference
) -> None:
    image, settings = Image.new("RGB", (5, 4)), {"size": 8, name: value}
    message = refusal(lambda: preprocess([image], asks_for(settings)), ConfigError)
    # A newer Pillow has more filters.
    assert re.match(re.escape(f"preprocessor_config.json: {name} is {value!r}: {advice}") + r"(, \d \w+)*$", message)
    if reference_too is None:  # the reference takes gigabytes, or returns values that are not finite
        return
    if reference_too:
        with pytest.raises((ValueError, TypeError, IndexError, KeyError)):
            by_reference([image], settings)
    else:
        by_reference([image], settings)


@pytest.mark.parametrize("value", [0, [8], {"height": 8}, {"shortest_edge": 8}, "8", True], ids=str)
def test_a_crop_of_no_size_is_refused(value: Any, asks_for) -> None:
    settings = {"do_center_crop": True, "size": 8, "crop_size": value}
    message = refusal(lambda: preprocess([Image.new("RGB", (5, 4))], asks_for(settings)), ConfigError)
    assert message == f"preprocessor_config.json: crop_size is {value!r}: {INCOMPLETE_SIZE}"


def test_a_setting_of_a_step_that_is_left_out_does_not_matter(asks_for) -> None:
    steps = {"do_resize": False, "resample": None, "size": {}, "do_rescale": False, "rescale_factor": None}
    settings = {**steps, "do_normalize": False, "image_std": 0}
    black = preprocess([Image.new("RGB", (5, 4), (0, 1, 2))], asks_for(settings))
    np.testing.assert_array_equal(black, np.broadcast_to(np.array([0, 1, 2], np.float32), (1, 4, 5, 3)))


def test_a_model_of_other_channels_is_refused(asks_for, tmp_path: Path) -> None:
    config = dataclasses.replace(asks_for({}), num_channels=1)
    message = refusal(lambda: preprocess([Image.new("L", (5, 4))], config))
    assert message == "the model takes 1 channels, and RGB images have 3: give a model of colour images"
    message = refusal(lambda: photographs.load([tmp_path / "any.png"], config))
    assert message == "photographs have 3 channels, but the model takes 1: omit --images"


def test_photographs_that_do_not_fit_the_model_are_refused(asks_for, tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "small.png")
    message = refusal(lambda: photographs.load([tmp_path / "small.png"], asks_for({"size": 8}, (8, 9))))
    assert message == (
        "the checkpoint's preprocessing gives photographs of [8, 8] pixels, but the model takes [8, 9]: omit --images"
    )


def test_without_pillow_it_says_what_to_install(asks_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = refusal(lambda: preprocess([tmp_path / "any.png"], asks_for({})))
    assert message == "reading images needs Pillow: pip install 'vit-ref[images]'"


def test_pillow_is_imported_when_an_image_is_read_and_not_before() -> None:
    modules = "vit_ref.preprocessing, vit_ref.verify.photographs"
    code = f"import sys, {modules}; print(sorted({{'PIL', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
