"""Random changes of training images: crop, flip and colour jitter, or any callable instead.

The parameters have the meaning that they have in torchvision's `RandomResizedCrop`, `RandomHorizontalFlip` and
`ColorJitter`. The images are Pillow's. The crop is from Szegedy et al., "Going Deeper with Convolutions" (2015),
section 6.
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

# All threads of a process share the global generators.
_GLOBAL_GENERATORS = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and colour jitter.

    Attributes:
      scale: least and greatest part of the image's area that the crop keeps.
      ratio: least and greatest width / height of the crop. The logarithm of the ratio is uniform.
      flip: probability of a mirror image.
      brightness: greatest distance of the brightness factor from 1; a factor of 0 gives black.
      contrast: greatest distance of the contrast factor from 1; a factor of 0 gives uniform grey.
      saturation: greatest distance of the saturation factor from 1; a factor of 0 gives a grey image.

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
        """Returns one random version of an image.

        Args:
          image: an RGB image.
          rng: the source of all randomness.
          size: (height, width) of the result, in pixels.
        """
        from PIL import Image

        height, width = size
        # Crop before resizing, as torchvision does: the resampling then sees nothing outside of the crop.
        image = image.crop(self.crop_box(rng, image.size)).resize((width, height), Image.Resampling.BILINEAR)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.jittered(image, rng)

    def jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns an image with its brightness, contrast and saturation changed, in random order.

        Args:
          image: an RGB image.
          rng: the source of all randomness.
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
        """Returns the part of an image to keep, as Pillow's (left, upper, right, lower).

        Args:
          rng: the source of all randomness.
          size: (width, height) of the image, in Pillow's order.
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
        # The image is longer than any crop may be, so take the largest allowed one from its middle.
        ratio = min(max(full_width / full_height, self.ratio[0]), self.ratio[1])
        width = max(1, min(full_width, round(full_height * ratio)))
        height = max(1, min(full_height, round(full_width / ratio)))
        left, upper = (full_width - width) // 2, (full_height - height) // 2
        return left, upper, left + width, upper + height


# Takes an RGB image of Pillow. Returns an image, or an array or tensor of uint8 or of floats from 0 to 1, with shape
# (height, width, 3) or (3, height, width).
Transform = Callable[[Any], Any]


def augment_image(
    augment: Augmentation | Transform, image: Image.Image, rng: np.random.Generator, size: tuple[int, int]
) -> Image.Image:
    """Returns one random version of an image, by `Augmentation` or by a transform of the caller.

    A transform, such as one of torchvision's, may draw from the global generators of Python, NumPy or PyTorch. This
    function seeds them from `rng`, and restores their state afterwards.

    Args:
      augment: the augmentation or transform.
      image: an RGB image.
      rng: the source of all randomness.
      size: (height, width) in pixels of the result of `Augmentation`. A transform chooses its own size.

    Raises:
      InputError: a transform did not return an image.
    """
    if isinstance(augment, Augmentation):
        return augment(image, rng, size)
    with _seeded(int(rng.integers(2**32))):
        return _image(augment(image))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # A transform can draw from PyTorch's generator only if torch is imported.
    torch = sys.modules.get("torch")
    with _GLOBAL_GENERATORS:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the transforms of others use it
        pytorch = torch.get_rng_state() if torch else None
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        if torch:
            # Seed the CPU's generator only: torch.manual_seed also seeds every accelerator, which cannot be restored.
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
            f"the augmentation returned {type(result).__name__} of shape {list(np.shape(result))}: return an image with"
            " 3 channels"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise InputError(
                f"the augmentation returned values from {pixels.min():.3g} to {pixels.max():.3g}: return uint8, or"
                " floats from 0 to 1; do not normalise, because the checkpoint's own normalisation follows"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise InputError(f"the augmentation returned {pixels.dtype}: return uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(pixels))
