"""Do the random changes of images have the distributions that their numbers say, and depend on the image's seed alone?

Seeds are fixed, so no test is flaky. A bound on something random has the probability of crossing it under another seed
beside it.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from vit_ref.errors import InputError
from vit_ref.finetune.augmentation import Augmentation, augment_image

DRAWS = 4000
NOTHING = Augmentation(scale=(1, 1), ratio=(1, 1), flip=0, brightness=0, contrast=0, saturation=0)
# With this many draws the distribution is off by more than this with probability 1e-6 (Dvoretzky, Kiefer and Wolfowitz:
# 2 exp(-2 n d**2)).
FAR = math.sqrt(math.log(2 / 1e-6) / 2 / DRAWS)


def changed(**fields: Any) -> Augmentation:
    return Augmentation(**{**vars(NOTHING), **fields})


def picture(height: int = 30, width: int = 30) -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))


def assert_uniform(values: NDArray, low: float, high: float, resolution: float = 0.0) -> None:
    """Applies Kolmogorov and Smirnov's test. `resolution` is the rounding of a value, as a part of the range."""
    values = (np.sort(values) - low) / (high - low)
    assert values[0] >= -resolution and values[-1] <= 1 + resolution
    assert np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max() < FAR + resolution


def boxes(augmentation: Augmentation, size: tuple[int, int]) -> NDArray:
    """Returns crop boxes (DRAWS, 4): left, upper, right, lower."""
    rng = np.random.default_rng(2)
    return np.array([augmentation.crop_box(rng, size) for _ in range(DRAWS)])


@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 0.5), (3 / 4, 4 / 3)), ((0.3, 0.45), (0.7, 1.5))])
def test_area_and_the_logarithm_of_the_ratio_are_uniform(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    width, height = 3000, 2000
    crops = boxes(Augmentation(scale, ratio), (width, height))
    sides = crops[:, 2:] - crops[:, :2]
    # No crop is longer than the image. Half a pixel is less than 0.1 % of a side, which is at least 900 pixels.
    assert_uniform(sides.prod(1) / (width * height), *scale, resolution=0.005)
    assert_uniform(np.log(sides[:, 0] / sides[:, 1]), *np.log(ratio), resolution=0.005)


def test_crops_lie_anywhere_in_the_image() -> None:
    crops = boxes(Augmentation((0.1, 0.1), (1, 1)), (2000, 1000))
    side = round(math.sqrt(0.1 * 2000 * 1000))
    assert (crops[:, 2:] - crops[:, :2] == side).all()
    # One pixel of at least 553 places.
    assert_uniform(crops[:, 0], 0, 2000 - side, resolution=0.002)
    assert_uniform(crops[:, 1], 0, 1000 - side, resolution=0.002)


@pytest.mark.parametrize(
    ("size", "box"),
    [((400, 100), (133, 0, 266, 100)), ((100, 400), (0, 133, 100, 266)), ((1, 1), (0, 0, 1, 1))],
)
def test_a_too_long_image_gets_the_largest_crop_in_its_middle(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    augmentation = Augmentation(scale=(0.9, 1.0))
    assert (boxes(augmentation, size) == box).all()


def test_the_crop_is_cut_out_before_it_is_resized() -> None:
    augmentation = changed(scale=(0.3, 0.6), ratio=(0.5, 2))
    image = picture(40, 50)
    for seed in range(20):
        found = augmentation(image, np.random.default_rng(seed), (16, 24))
        box = augmentation.crop_box(np.random.default_rng(seed), image.size)
        alone = Image.fromarray(np.asarray(image)[box[1] : box[3], box[0] : box[2]])
        assert found == alone.resize((24, 16), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_images_are_mirrored_as_often_as_asked(flip: float) -> None:
    image, rng = picture(), np.random.default_rng(3)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = [changed(flip=flip)(image, rng, (30, 30)) for _ in range(DRAWS)]
    assert all(each in (image, mirrored) for each in found)
    # Five standard deviations: probability 6e-7.
    bound = 5 * math.sqrt(flip * (1 - flip) / DRAWS)
    assert abs(sum(each == mirrored for each in found) / DRAWS - flip) <= bound


# Jitter -> (two pixels, how to read the factor from their red, green and blue)
FACTORS: dict[str, tuple[list[list[int]], Callable[[NDArray], float]]] = {
    "brightness": ([[100, 100, 100]] * 2, lambda pixels: pixels[0, 0] / 100),
    # The difference of the two, whatever the mean is.
    "contrast": ([[150, 150, 150], [50, 50, 50]], lambda pixels: (pixels[0, 0] - pixels[1, 0]) / 100),
    "saturation": ([[100, 80, 55]] * 2, lambda pixels: (pixels[0, 0] - pixels[0, 2]) / 45),
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_factor_of_a_jitter_is_uniform_around_one(name: str) -> None:
    colours, factor = FACTORS[name]
    image, rng = Image.fromarray(np.array([colours], np.uint8)), np.random.default_rng(4)
    jitter = changed(**{name: 0.5})
    found = np.array([factor(np.asarray(jitter.jittered(image, rng), float)[0]) for _ in range(DRAWS)])
    # Two values are rounded or cut off, by up to 1 each, and are at least 45.
    assert_uniform(found, 0.5, 1.5, resolution=2 / 45)


def test_jitters_come_in_every_order() -> None:
    jitter = changed(brightness=0.9, contrast=0.9, saturation=0.9)
    image = picture()
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        rng = np.random.default_rng(seed)
        order = tuple(int(i) for i in rng.permutation(3))
        steps = [(ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i] for i in order]
        expected = image
        for step in steps:
            expected = step(expected).enhance(rng.uniform(0.1, 1.9))
        assert jitter.jittered(image, np.random.default_rng(seed)) == expected
        counts[order] = counts.get(order, 0) + 1
    # 100 of each are expected, with a standard deviation of 9.1.
    assert len(counts) == 6 and min(counts.values()) > 50


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scale": (0.0, 1.0)}, "scale is 0.0 to 1.0"),
        ({"scale": (0.5, 1.5)}, "scale is 0.5 to 1.5"),
        ({"ratio": (2.0, 1.0)}, "ratio is 2.0 to 1.0"),
        ({"ratio": (-1.0, 1.0)}, "ratio is -1.0 to 1.0"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"brightness": -0.1}, "brightness is -0.1"),
        ({"saturation": math.nan}, "saturation is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Augmentation(**fields)


def by_anybody(transform: Callable[[Any], Any], seed: int = 0) -> Image.Image:
    # 1020 values, so that nearly all of 0 to 255 occur.
    return augment_image(transform, picture(17, 20), np.random.default_rng(seed), (17, 20))


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: image,
        np.asarray,
        lambda image: np.asarray(image).transpose(2, 0, 1),
        lambda image: np.asarray(image) / 255,
        lambda image: np.asarray(image, np.float32).transpose(2, 0, 1) / 255,
        lambda image: (np.asarray(image) - 0.4).clip(0) / 255,
    ],
    ids=["image", "bytes", "channels first", "float64", "float32, channels first", "rounded"],
)
def test_whatever_a_transform_makes_of_an_image_is_an_image(transform: Callable[[Any], Any]) -> None:
    assert by_anybody(transform) == picture(17, 20)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (lambda image: None, "returned NoneType of shape []"),
        (lambda image: np.asarray(image)[..., 0], "returned ndarray of shape [17, 20]"),
        (lambda image: np.asarray(image)[None], "returned ndarray of shape [1, 17, 20, 3]"),
        (lambda image: np.asarray(image) / 127.5 - 1, "do not normalise"),
        (lambda image: np.asarray(image) * np.nan, "returned values from nan"),
        (lambda image: np.asarray(image, np.int64), "returned int64"),
    ],
)
def test_what_is_no_image_is_refused(transform: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        by_anybody(transform)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def global_draws() -> tuple[float, float]:
    return random.random(), float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python's", "NumPy's"])
def test_a_transform_with_global_randomness_depends_on_the_seed(
    draw: Callable[[], float],
) -> None:
    def grey(image: Image.Image) -> NDArray:
        draws = [draw() for _ in range(15)]
        return np.repeat(np.reshape(draws, (5, 3, 1)), 3, axis=2)

    found = []
    for seed in (0, 0, 1):
        found.append(by_anybody(grey, seed))
        draw()  # so that no two start from the state that the last one left
    assert found[0] == found[1] != found[2]


def test_global_generators_are_restored_after_a_failure() -> None:
    def fails(image: Image.Image) -> Any:
        global_draws()
        raise KeyError("its own fault")

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = [global_draws() for _ in range(2)]
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    found = [global_draws()]
    with pytest.raises(KeyError, match="its own fault"):
        by_anybody(fails)
    assert [*found, global_draws()] == expected


@pytest.mark.torch
def test_pytorchs_generator_is_seeded_and_left_as_it_was() -> None:
    torch = pytest.importorskip("torch")

    def noise(image: Image.Image) -> Any:
        return torch.rand(3, 4, 5)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = [by_anybody(noise, seed) for seed in (0, 0, 1)]
    assert (torch.rand(3) == expected).all()
    assert found[0] == found[1] == by_anybody(noise, 0) != found[2]


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(5))
def test_crop_flip_and_jitter_are_torchvisions_to_the_last_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applies torchvision's operations to Pillow's images, with the parameters drawn here."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    augmentation, image = Augmentation(flip=1.0), picture(37, 53)
    rng = np.random.default_rng(seed)
    left, upper, right, lower = augmentation.crop_box(rng, image.size)
    expected = functional.resized_crop(image, upper, left, lower - upper, right - left, (16, 24))
    rng.random()
    expected = functional.hflip(expected)
    for i in rng.permutation(3):
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[i]
        expected = adjust(expected, rng.uniform(0.8, 1.2))
    assert augmentation(image, np.random.default_rng(seed), (16, 24)) == expected


@pytest.mark.torch
def test_a_transform_of_torchvision_takes_the_place() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    torch = pytest.importorskip("torch")
    pieces = [v2.RandomResizedCrop((17, 20)), v2.ColorJitter(0.4, 0.4, 0.4)]
    as_image, as_bytes, as_floats = (
        v2.Compose([*pieces, *more])
        for more in ([], [v2.ToImage()], [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    )
    first, again, other = (by_anybody(as_image, seed) for seed in (0, 0, 1))
    assert first == again == by_anybody(as_bytes) == by_anybody(as_floats) != other


def test_without_pytorch_pythons_and_numpys_generators_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    def grey(image: Image.Image) -> NDArray:
        return np.full((5, 3, 3), sum(global_draws()) / 2)

    found = [by_anybody(grey, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert "torch" not in sys.modules
