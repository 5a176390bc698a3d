"""Are images equal to those of `ViTImageProcessor`, to the last bit, except where the documentation says otherwise?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vit_ref.preprocessing import explicit, for_size, preprocess
from vit_ref.verify import photographs

Picture = Callable[..., NDArray]

FILTERS = {method.name: method.value for method in Image.Resampling}
SOURCE = (37, 53)
TARGETS = {"down": (11, 17), "up": (71, 97), "up and down": (23, 97), "same": SOURCE}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _palette(colours: int, transparency: int | bytes | None) -> Callable[[Image.Image], Image.Image]:
    def convert(image: Image.Image) -> Image.Image:
        indexed = image.convert("RGB").quantize(colours)
        if transparency is not None:
            indexed.info["transparency"] = transparency
        return indexed

    return convert


# Name -> (how the file is made of an RGBA picture, its suffix)
KINDS: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "RGB": (lambda image: image.convert("RGB"), "png"),
    "RGB-jpeg": (lambda image: image.convert("RGB"), "jpg"),
    "grey": (lambda image: image.convert("L"), "png"),
    "grey-jpeg": (lambda image: image.convert("L"), "jpg"),
    "bilevel": (lambda image: image.convert("1"), "png"),
    "alpha": (lambda image: image, "png"),
    "grey-alpha": (lambda image: image.convert("LA"), "png"),
    "palette": (_palette(200, None), "png"),
    "palette-one-transparent": (_palette(200, 3), "gif"),
    "palette-alpha": (_palette(200, bytes(range(200))), "png"),
    "CMYK": (lambda image: image.convert("CMYK"), "jpg"),
}


def assert_same_bits(found: NDArray, expected: NDArray) -> None:
    """Checks the bits, because numpy's == would take -0.0 for 0.0."""
    assert found.dtype == expected.dtype == np.float32 and found.shape == expected.shape
    wrong = np.ascontiguousarray(found).view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)
    assert not wrong.any(), f"{wrong.mean():.1%} differ, by at most {np.abs(found - expected).max():.2e}"


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, picture: Picture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    convert, suffix = KINDS[request.param]
    path = tmp_path_factory.mktemp("made") / f"{request.param}.{suffix}"
    convert(Image.fromarray(picture(*SOURCE))).save(path)
    return path


@pytest.mark.parametrize("method", FILTERS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_image_has_the_references_bits(
    file: Path, target: str, method: str, asks_for, by_reference
) -> None:
    height, width = TARGETS[target]
    settings = {"size": {"height": height, "width": width}, "resample": FILTERS[method], **IMAGENET}
    with Image.open(file) as image:
        expected = by_reference([image], settings)
    assert_same_bits(preprocess([file], asks_for(settings)), expected)


@pytest.mark.parametrize(("do_resize", "do_rescale", "do_normalize"), list(itertools.product([True, False], repeat=3)))
def test_every_step_can_be_left_out(
    do_resize: bool, do_rescale: bool, do_normalize: bool, picture: Picture, asks_for, by_reference
) -> None:
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    flags = {"do_resize": do_resize, "do_rescale": do_rescale, "do_normalize": do_normalize}
    settings = {**flags, "size": [10, 14], **IMAGENET}
    expected = by_reference([image], settings)
    assert expected.dtype == (np.float32 if do_rescale or do_normalize else np.uint8)
    # Whole numbers to 255, which float32 represents exactly.
    assert_same_bits(preprocess([image], asks_for(settings)), expected.astype(np.float32))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 19},
        {"size": [19, 8]},
        {"size": {"width": 8, "height": 19}},
        {"size": 19, "resample": 3, "rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": 1.0},
        {"size": 19, "rescale_factor": 2, "do_normalize": False},
        {"size": 19, "image_mean": None, "image_std": [0.1, 0.2, 0.3]},
        # The file of a feature extractor of 2021, and steps that are switched off.
        {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
         "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": 224},
        {"size": 19, "do_center_crop": False, "crop_size": 8, "do_pad": None},
    ],
    ids=str,
)  # fmt: skip
def test_settings_mean_what_they_mean_to_the_reference(
    settings: dict[str, Any], picture: Picture, asks_for, by_reference
) -> None:
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    assert_same_bits(preprocess([image], asks_for(settings)), by_reference([image], settings))


def test_the_file_that_the_reference_writes_is_followed(picture: Picture, asks_for, by_reference) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.ViTImageProcessor(size={"height": 21, "width": 9}, resample=1, **IMAGENET)
    settings = json.loads(written.to_json_string())
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    expected = by_reference([image], {"size": [21, 9], "resample": 1, **IMAGENET})
    assert_same_bits(preprocess([image], asks_for(settings)), expected)


DEIT = "DeiTImageProcessor"
# Like the file of facebook/deit-base-patch16-224, but smaller.
DEIT_OF_OLD = {
    "feature_extractor_type": "DeiTFeatureExtractor",
    **{"do_resize": True, "size": 32, "resample": 3, "do_center_crop": True, "crop_size": 28, "do_normalize": True},
    **IMAGENET,
}


@pytest.mark.parametrize(
    "settings",
    [
        DEIT_OF_OLD,
        {**DEIT_OF_OLD, "size": 33},
        {**DEIT_OF_OLD, "size": [31, 40], "crop_size": {"height": 20, "width": 13}},
        # An image smaller than the crop gets a black border, on one side or on both.
        {**DEIT_OF_OLD, "size": 17},
        {**DEIT_OF_OLD, "size": [40, 17], "crop_size": [28, 30]},
        {**DEIT_OF_OLD, "do_resize": False, "crop_size": [30, 61]},
        {**DEIT_OF_OLD, "do_rescale": False, "do_normalize": False},
        # Missing values are those of DeiT's own processor: bicubic, and a crop.
        {"image_processor_type": DEIT, "size": 32, "crop_size": 28},
        {"image_processor_type": DEIT, "size": 32, "do_center_crop": None},
    ],
    ids=str,
)
def test_a_crop_has_the_bits_of_deits_own_processor(
    settings: dict[str, Any], picture: Picture, asks_for, by_reference
) -> None:
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    assert_same_bits(preprocess([image], asks_for(settings)), by_reference([image], settings, DEIT).astype(np.float32))


@pytest.mark.parametrize(
    ("settings", "written_out"),
    [
        ({"image_processor_type": DEIT}, {"size": 256, "crop_size": 224, "resample": 3}),
        ({"do_center_crop": True, "size": 256}, {"size": 256, "crop_size": 224, "resample": 2}),
        ({"do_center_crop": True, "size": 256, "crop_size": None}, {"size": 256, "crop_size": 224, "resample": 2}),
    ],
    ids=str,
)
def test_sizes_missing_from_a_cropping_file_are_the_models(
    settings: dict[str, Any], written_out: dict[str, Any], picture: Picture, asks_for, by_reference
) -> None:
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    expected = by_reference([image], written_out, DEIT)
    assert expected.shape == (1, 224, 224, 3)
    assert_same_bits(preprocess([image], asks_for(settings, (224, 224))), expected)
    # For a model of 28 pixels it is an eighth of all.
    small = {name: value // 8 for name, value in written_out.items() if name != "resample"}
    if "size" not in settings:
        expected = by_reference([image], {**written_out, **small}, DEIT)
        assert_same_bits(preprocess([image], asks_for(settings, (28, 28))), expected)


@pytest.mark.parametrize("processor", ["ViTImageProcessor", DEIT])
@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_step_that_is_null_is_left_out_as_by_the_reference(
    step: str, processor: str, picture: Picture, asks_for, by_reference
) -> None:
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    settings = {"image_processor_type": processor, "size": 19, "crop_size": 18, step: None}
    expected = by_reference([image], settings, processor)
    assert_same_bits(preprocess([image], asks_for(settings)), expected)
    stated = by_reference([image], {**settings, step: True}, processor)
    assert stated.shape != expected.shape or (stated != expected).any()


def test_null_is_the_default_in_the_file_of_a_fast_processor(picture: Picture, asks_for, by_reference) -> None:
    """Needs torchvision. The defaults are those of the slow processor, for the same file without the nulls."""
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    stated = {"size": {"height": 19, "width": 8}}
    nulls = ("crop_size", "do_center_crop", "do_normalize", "do_pad", "do_rescale", "do_resize", "resample")
    settings = {"image_processor_type": "ViTImageProcessorFast", **stated, **dict.fromkeys(nulls)}
    assert_same_bits(preprocess([image], asks_for(settings)), by_reference([image], stated))


@pytest.mark.parametrize(
    ("preprocessor", "processor"),
    [(None, "ViTImageProcessor"), ({"resample": 3}, "ViTImageProcessor"), ({"image_processor_type": DEIT}, DEIT)],
)
def test_explicit_preprocessing_is_the_same_to_the_reference(
    preprocessor: dict[str, Any] | None, processor: str, picture: Picture, asks_for, by_reference
) -> None:
    image, config = Image.fromarray(picture(*SOURCE)).convert("RGB"), asks_for(preprocessor, (19, 8))
    written = explicit(config)
    assert_same_bits(preprocess([image], config), by_reference([image], written, processor))
    assert explicit(dataclasses.replace(config, preprocessor=written)) == written


@pytest.mark.parametrize(
    ("preprocessor", "changed"),
    [
        ({"size": 10}, {"size": {"height": 20, "width": 28}}),
        (
            {"do_center_crop": True, "size": [12, 16], "crop_size": [10, 14]},
            {"size": {"height": 24, "width": 32}, "crop_size": {"height": 20, "width": 28}},
        ),
        ({"do_center_crop": True, "do_resize": False}, {"crop_size": {"height": 20, "width": 28}}),
    ],
)
def test_another_image_size_keeps_the_part_that_is_cropped(
    preprocessor: dict[str, Any], changed: dict[str, Any], asks_for
) -> None:
    assert for_size(asks_for(preprocessor), 20, 28) == {**preprocessor, **changed}
    assert for_size(asks_for(None), 20, 28) is None


@pytest.mark.parametrize("settings", [None, {}, {"size": None}])
def test_without_a_size_images_get_the_models(
    settings: dict[str, Any] | None, picture: Picture, asks_for, by_reference
) -> None:
    """Compares sizes: `ViTImageProcessor` makes 224 by 224, which only a model of that size takes."""
    image = Image.fromarray(picture(*SOURCE)).convert("RGB")
    assert by_reference([image], settings or {}).shape == (1, 224, 224, 3)
    assert_same_bits(preprocess([image], asks_for(settings, (224, 224))), by_reference([image], settings or {}))
    expected = by_reference([image], {"size": {"height": 6, "width": 9}})
    assert_same_bits(preprocess([image], asks_for(settings, (6, 9))), expected)


def test_a_batch_is_each_image_by_itself_in_order(picture: Picture, asks_for, tmp_path: Path) -> None:
    """Mixes modes in a batch, because the reference treats a whole batch like its first image."""
    rgb = Image.fromarray(picture(*SOURCE)).convert("RGB")
    grey = Image.fromarray(picture(20, 9, seed=1)).convert("L")
    grey.save(tmp_path / "grey.png")
    images = [tmp_path / "grey.png", rgb, str(tmp_path / "grey.png"), Image.fromarray(picture(1, 1))]
    together = preprocess(images, asks_for({}))
    assert together.shape == (4, 10, 14, 3)
    assert_same_bits(together, np.concatenate([preprocess([image], asks_for({})) for image in images]))
    assert_same_bits(together[:1], together[2:3])


# EXIF orientation -> transform to upright pixels (EXIF 2.32, tag 274: the sides of row 0 and column 0)
UPRIGHT: dict[int, Callable[[NDArray], NDArray]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright_where_reference_ignores_exif(
    orientation: int, suffix: str, picture: Picture, asks_for, by_reference, tmp_path: Path
) -> None:
    """Compares two ways: the reference agrees for upright pixels, and we agree with it for the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(picture(*SOURCE)).convert("RGB").save(path, exif=exif)
    with Image.open(path) as image:
        stored = np.asarray(image)
        ignoring = by_reference([image], {"size": [10, 14]})
    ours = preprocess([path], asks_for({}))
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](stored)))
    assert_same_bits(ours, by_reference([upright], {"size": [10, 14]}))
    assert_same_bits(ignoring, preprocess([Image.fromarray(stored)], asks_for({})))
    assert (ours == ignoring).all() == (orientation == 1)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_tiff_which_pillow_itself_turns_is_turned_once(
    orientation: int, picture: Picture, asks_for, by_reference, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(picture(*SOURCE)[..., :3])
    Image.fromarray(stored).save(tmp_path / "turned.tif", exif=exif)
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](stored)))
    assert_same_bits(preprocess([tmp_path / "turned.tif"], asks_for({})), by_reference([upright], {"size": [10, 14]}))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_every_image_becomes_rgb_without_the_references_flag(mode: str, picture: Picture, by_reference) -> None:
    image = Image.fromarray(picture(*SOURCE)).convert("RGB" if mode == "P" else "RGBA").convert(mode)
    with pytest.raises(ValueError, match=r"Unable to infer channel dimension|Unsupported number of image dimensions"):
        by_reference([image], {"do_convert_rgb": None})


def test_alpha_is_dropped_and_not_blended(picture: Picture, asks_for) -> None:
    pixels = picture(*SOURCE)
    assert pixels[..., 3].min() == 0 and pixels[..., 3].max() == 255
    colours = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    assert_same_bits(preprocess([Image.fromarray(pixels)], asks_for({})), preprocess([colours], asks_for({})))


def _png_16_bit(path: Path, values: NDArray) -> None:
    """Writes a 16-bit colour PNG, which Pillow cannot. `values` is (height, width, 3), uint16."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("RGB", "png")])
def test_16_bits_keep_the_high_byte_where_the_reference_clips(
    mode: str, suffix: str, picture: Picture, asks_for, by_reference, tmp_path: Path
) -> None:
    """Shows that only the conversion of 16-bit grey differs: Pillow clips at 255, and we shift by eight bits."""
    high, low = picture(*SOURCE)[..., 0].astype(np.uint16), picture(*SOURCE, seed=1)[..., 0]
    values = high << 8 | low
    path = tmp_path / f"deep.{suffix}"
    if mode == "RGB":
        _png_16_bit(path, np.stack([values] * 3, axis=-1))
    else:
        data = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        Image.frombytes(mode, SOURCE[::-1], data).save(path)
    with Image.open(path) as image:
        theirs = by_reference([image], {"size": [10, 14]})
    expected = by_reference([Image.fromarray(high.astype(np.uint8))], {"size": [10, 14]})
    assert_same_bits(preprocess([path], asks_for({})), expected)
    if mode == "RGB":
        assert_same_bits(theirs, expected)
    else:
        clipped = Image.fromarray(np.minimum(values, 255).astype(np.uint8))
        assert_same_bits(theirs, by_reference([clipped], {"size": [10, 14]}))
        assert (theirs != expected).any()


def test_16_bits_are_turned_upright_too(picture: Picture, asks_for, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    high = picture(*SOURCE)[..., 0]
    Image.fromarray(high.astype(np.uint16) << 8).save(tmp_path / "deep.png", exif=exif)
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(high, -1)))
    assert_same_bits(preprocess([tmp_path / "deep.png"], asks_for({})), preprocess([upright], asks_for({})))


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_are_an_image_where_the_reference_sees_channels(
    rows: int, picture: Picture, asks_for, by_reference
) -> None:
    """Shows that only that guess differs: with the place of the channels given, the reference agrees."""
    image = Image.fromarray(picture(rows, 53)).convert("RGB")
    ours = preprocess([image], asks_for({}))
    assert_same_bits(ours, by_reference([image], {"size": [10, 14]}, input_data_format="channels_last"))
    if rows == 1:
        with pytest.raises(ValueError, match="mean must have 1 elements"):
            by_reference([image], {"size": [10, 14]})
    else:
        assert (by_reference([image], {"size": [10, 14]}) != ours).any()


def test_photographs_of_parity_are_preprocessed_here(picture: Picture, asks_for, by_reference, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "a").mkdir()
    Image.fromarray(picture(*SOURCE)).convert("RGB").save(tmp_path / "a" / "turned.png", exif=exif)
    Image.fromarray(picture(20, 9, seed=1)).convert("L").save(tmp_path / "b.png")
    settings = {"size": [10, 14], "resample": 3, **IMAGENET}
    found = photographs.load(photographs.find(tmp_path, 4), asks_for(settings))
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(picture(*SOURCE)[..., :3])))
    grey = Image.fromarray(picture(20, 9, seed=1)).convert("L").convert("RGB")
    assert_same_bits(found, by_reference([turned, grey], settings))
