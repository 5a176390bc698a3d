"""Images as a checkpoint's `preprocessor_config.json` asks for them: upright, RGB, resized, rescaled, normalised.

The arithmetic is that of transformers' `ViTImageProcessor`, in its order and its dtypes, with Pillow and NumPy alone:
the result is the same to the last bit. They part in these cases:

- The EXIF orientation is followed: photographs come upright. `ViTImageProcessor` ignores it.
- Every image becomes RGB, as under `do_convert_rgb`: grey is repeated, palettes are looked up, alpha is dropped and not
  blended. Without that flag `ViTImageProcessor` refuses all but three channels.
- 16-bit grey keeps its high byte, as Pillow reads 16-bit colour. Pillow's conversion of grey, and `ViTImageProcessor`
  with it, makes all above 255 white. 32-bit grey has no known white and is refused.
- Images of one or three rows are images; `ViTImageProcessor` takes their height for the channels.
- Without a `size` images get the model's own, not 224.
- `do_center_crop` and `do_pad` are refused; `ViTImageProcessor` leaves them out and says nothing.
- The result is always float32; with neither rescaling nor normalisation `ViTImageProcessor`'s is uint8.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL import Image

_LARGEST = float(np.finfo(np.float32).max)
# What ViTImageProcessor does where the file is silent; `size` is the model's own.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
}
# What counts as an image where a directory is searched for them.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# The file may say null here and mean the default.
_NULLABLE = ("size", "image_mean", "image_std")


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is done to the pixels, in this order; None for a step that is left out.

    Attributes:
      size: (height, width) to resize to.
      resample: how, by Pillow's number, as the file has it.
      scale: factor of the pixels' values.
      mean_and_std: one number each for red, green and blue; subtracted, and divided by.
    """

    size: tuple[int, int] | None
    resample: int
    scale: float | None
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None


def preprocess(images: Sequence[str | os.PathLike[str] | Image.Image], config: ViTConfig) -> NDArray:
    """Images as the model takes them.

    Args:
      images: files, or Pillow's images.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Returns:
      (len(images), height, width, 3), float32.

    Raises:
      InputError: an image cannot be read, images that are not resized differ in size, the model does not take colour
        images, or Pillow is missing.
      ConfigError: `preprocessor` asks for something unknown.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InputError("reading images needs Pillow: pip install 'vit-ref[images]'") from None

    if config.num_channels != 3:
        raise InputError(f"images have 3 channels once they are RGB, the model takes {config.num_channels}")
    if not images:
        raise InputError("no images: give at least one")
    todo = steps(config)
    if todo.size is not None:
        _require_resampling(todo.resample)
    batch: list[NDArray] = []
    for i, image in enumerate(images):
        name = f"image {i}" if isinstance(image, Image.Image) else os.fspath(image)
        batch.append(_apply(todo, read_image(image, name)))
        if batch[-1].shape != batch[0].shape:
            found, first = (f"{array.shape[0]}x{array.shape[1]}" for array in (batch[-1], batch[0]))
            raise InputError(f"{name}: {found} pixels, but the first image has {first}, and do_resize is false")
    return np.stack(batch)


def read_image(source: str | os.PathLike[str] | IO[bytes] | Image.Image, name: str) -> Image.Image:
    """One image, upright and RGB.

    Args:
      source: a file, by name or open, or Pillow's image.
      name: what it is called in an error.

    Raises:
      InputError: it cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(source) as image:
            return _upright_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    # Damaged bytes leave Pillow's decoders as OSError, SyntaxError, ValueError, TypeError, struct.error and others.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{name}: not a readable image ({reason})") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    # Until 11.0 Pillow opens a 16-bit PNG in mode "I", which elsewhere means 32 bits.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"32-bit grey (mode {image.mode}) has no known white: save it as 8-bit grey")
    if image.mode == "P":
        # Straight to RGB the colours are the same, but Pillow warns that a palette's alpha is lost.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _apply(todo: Steps, image: Image.Image) -> NDArray:
    if todo.size is not None:
        height, width = todo.size
        image = image.resize((width, height), todo.resample)
    pixels: NDArray = np.asarray(image)
    if todo.scale is not None:
        pixels = pixels.astype(np.float64) * todo.scale
    pixels = pixels.astype(np.float32)
    if todo.mean_and_std is not None:
        mean, std = np.array(todo.mean_and_std, np.float32)
        pixels = (pixels - mean) / std
    return pixels


def steps(config: ViTConfig) -> Steps:
    """What is done to an image for this checkpoint. Whether Pillow has that `resample` is seen by `preprocess` alone.

    Raises:
      ConfigError: `preprocessor` asks for something unknown.
    """
    given = config.preprocessor or {}
    for name in ("do_center_crop", "do_pad"):
        if given.get(name):
            _refuse(name, given[name], "a ViT's images are resized, rescaled and normalised, and nothing else")
    silent = {name for name in _NULLABLE if given.get(name) is None}
    settings = {**_DEFAULTS, "size": config.image_hw, **{k: v for k, v in given.items() if k not in silent}}
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not isinstance(settings[name], bool):
            _refuse(name, settings[name], "give true or false")
    scale = settings["rescale_factor"]
    if settings["do_rescale"] and not _is_number(scale):
        _refuse("rescale_factor", scale, "give a number")
    return Steps(
        size=_size(settings["size"]) if settings["do_resize"] else None,
        resample=settings["resample"] if settings["do_resize"] else 0,
        scale=scale if settings["do_rescale"] else None,
        mean_and_std=_mean_and_std(settings) if settings["do_normalize"] else None,
    )


def _refuse(name: str, value: Any, advice: str) -> NoReturn:
    raise ConfigError(f"preprocessor_config.json: {name} is {value!r}: {advice}")


def _size(value: Any) -> tuple[int, int]:
    """(height, width) from an int, as in the files of old feature extractors, a pair, or a mapping of exactly these."""
    if isinstance(value, Mapping):
        sides = [value["height"], value["width"]] if value.keys() == {"height", "width"} else []
    else:
        sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or any(not _is_side(side) for side in sides):
        _refuse("size", value, "give a height and a width in pixels; a ViT's images have both, no shortest_edge")
    return sides[0], sides[1]


def _is_side(value: Any) -> bool:
    # Pillow counts the bytes of a row in 32 bits.
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**16


def _require_resampling(value: Any) -> None:
    from PIL import Image

    if not isinstance(value, int) or isinstance(value, bool) or value not in list(Image.Resampling):
        known = ", ".join(f"{method.value} {method.name.lower()}" for method in sorted(Image.Resampling))
        _refuse("resample", value, f"known are {known}")


def _mean_and_std(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    both = []
    for name in ("image_mean", "image_std"):
        value = settings[name]
        values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        if len(values) != 3 or not all(_is_number(each) for each in values):
            _refuse(name, value, "give a number, or one for each of red, green and blue")
        both.append(tuple(map(float, values)))
    if not np.array(both[1], np.float32).all():
        _refuse("image_std", settings["image_std"], "it divides, so it cannot be zero")
    return both[0], both[1]


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
