"""Random changes of training images: crop, flip and colour jitter; or any callable in their place.

The numbers mean what they do in torchvision: `RandomResizedCrop`, `RandomHorizontalFlip` and `ColorJitter`, on Pillow's
images. The crop is from Szegedy et al., "Going Deeper with Convolutions" (2015), section 6.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_ref.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Global generators are one for all threads of a process.
_GLOBAL_GENERATORS = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and colour jitter.

    Attributes:
      scale: least and greatest part of the image's area that is kept.
      ratio: least and greatest width / height of what is kept; its logarithm is uniform.
      flip: probability of a mirror image.
      brightness: how far from 1 the factor may be, both ways; black is 0.
      contrast: likewise; uniform grey is 0.
      saturation: likewise; grey is 0.

    Raises:
      InputError: a value is out of range.
    """

    scale: tuple[float, float] = (0.7, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self) -> None:
        for name, greatest in (("scale", 1.0), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= greatest:
                raise InputError(f"{name} is {low} to {high}: give two numbers, 0 < least <= greatest <= {greatest}")
        for name in ("flip", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a number from 0 to 1")

    def __call__(self, image: Image.Image, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
        """One random version of an image.

        Args:
          image: RGB.
          rng: where all randomness comes from.
          size: (height, width) of the result.
        """
        from PIL import Image

        height, width = size
        # First cut, then resized, as torchvision does: the resampling sees nothing outside of the crop.
        image = image.crop(self.crop_box(rng, image.size)).resize((width, height), Image.Resampling.BILINEAR)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.jittered(image, rng)

    def jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """An image with its brightness, contrast and saturation changed, in random order.

        Args:
          image: RGB.
          rng: where all randomness comes from.
        """
        from PIL import ImageEnhance

        jitter = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        )
        for i in rng.permutation(len(jitter)):
            enhance, strength = jitter[i]
            if strength:
                image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
        return image

    def crop_box(self, rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part of an image that is kept, as Pillow's (left, upper, right, lower).

        Args:
          rng: where all randomness comes from.
          size: (width, height) of the image, as Pillow has it.
        """
        full_width, full_height = size
        for _ in range(10):
            area = full_width * full_height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= full_width and 0 < height <= full_height:
                left = int(rng.integers(full_width - width + 1))
                upper = int(rng.integers(full_height - height + 1))
                return left, upper, left + width, upper + height
        # The image is longer than any crop may be: the largest one in its middle.
        ratio = min(max(full_width / full_height, self.ratio[0]), self.ratio[1])
        width = max(1, min(full_width, round(full_height * ratio)))
        height = max(1, min(full_height, round(full_width / ratio)))
        left, upper = (full_width - width) // 2, (full_height - height) // 2
        return left, upper, left + width, upper + height


# Pillow's RGB image -> an image, or an array or tensor, (height, width, 3) or (3, height, width): bytes, or 0 to 1
Transform = Callable[[Any], Any]


def augment_image(
    augment: Augmentation | Transform, image: Image.Image, rng: np.random.Generator, size: tuple[int, int]
) -> Image.Image:
    """One random version of an image, by this package's augmentation or by anybody's transform.

    A transform, such as one of torchvision's, may draw from Python's, NumPy's or PyTorch's global generator: these are
    seeded from `rng` before, and are after as they were before.

    Args:
      augment: what to do.
      image: RGB.
      rng: where all randomness comes from.
      size: (height, width) that `Augmentation` gives the result; a transform chooses its own.

    Raises:
      InputError: a transform returned no image.
    """
    if isinstance(augment, Augmentation):
        return augment(image, rng, size)
    with _seeded(int(rng.integers(2**32))):
        return _image(augment(image))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Only where it is loaded can a transform draw from it.
    torch = sys.modules.get("torch")
    with _GLOBAL_GENERATORS:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the transforms of others use it
        pytorch = torch.get_rng_state() if torch else None
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        if torch:
            # The CPU's alone: torch.manual_seed would seed every accelerator as well, and they could not be put back.
            torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            if torch:
                torch.set_rng_state(pytorch)


def _image(result: Any) -> Image.Image:
    from PIL import Image

    if isinstance(result, Image.Image):
        return result
    pixels = np.asarray(result)
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(
            f"the augmentation returned {type(result).__name__} of shape {list(np.shape(result))}: let it return an"
            " image with 3 channels"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise InputError(
                f"the augmentation returned values from {pixels.min():.3g} to {pixels.max():.3g}: let it return bytes,"
                " or 0 to 1, without normalisation; the checkpoint's own follows"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise InputError(f"the augmentation returned {pixels.dtype}: let it return bytes, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(pixels))
