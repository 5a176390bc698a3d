"""Images as a checkpoint's `preprocessor_config.json` asks for them: upright, RGB, resized, cropped, normalised.

The arithmetic is that of transformers' `ViTImageProcessor`, and of its `DeiTImageProcessor` where the file names that
or asks for a crop. It keeps their order and their dtypes, with Pillow and NumPy alone: the result is the same to the
last bit. They part in these cases:

- The EXIF orientation is followed: photographs come upright. `ViTImageProcessor` ignores it.
- Every image becomes RGB, as under `do_convert_rgb`: grey is repeated, palettes are looked up, alpha is dropped and not
  blended. Without that flag `ViTImageProcessor` refuses all but three channels.
- 16-bit grey keeps its high byte, as Pillow reads 16-bit colour. Pillow's conversion of grey, and `ViTImageProcessor`
  with it, makes all above 255 white. 32-bit grey has no known white and is refused.
- Images of one or three rows are images; `ViTImageProcessor` takes their height for the channels.
- Without a `size` images get the model's own, not 224. Without a `crop_size` the crop has the model's size, and where
  DeiT's file has no `size` either, images are resized to 256/224 of it.
- `do_center_crop` is followed in every file. `ViTImageProcessor` leaves the crop out and says nothing.
- `do_pad` is refused. `ViTImageProcessor` leaves the padding out and says nothing.
- The result is always float32; with neither rescaling nor normalisation `ViTImageProcessor`'s is uint8.

A step that is null, such as `do_rescale: null`, is left out, as by these classes of transformers 4. Where the file
names a fast processor, such as `ViTImageProcessorFast`, null means the default everywhere, as to that processor.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import ConfigError, InputError
from vit_ref.image_files import require_pillow
from vit_ref.model.config import ViTConfig

if TYPE_CHECKING:
    from PIL import Image

_LARGEST = float(np.finfo(np.float32).max)
# What ViTImageProcessor does where the file is silent; sizes follow from the model.
_VIT: dict[str, Any] = {
    "do_resize": True,
    "resample": 2,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_DEIT = {**_VIT, "resample": 3, "do_center_crop": True}
# DeiT's images are resized to this multiple of what is cropped from them.
_DEIT_MARGIN = 256 / 224
# Null means the default here, whichever processor the file names.
_NULLABLE = ("size", "crop_size", "image_mean", "image_std")


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is done to the pixels, in this order; None for a step that is left out.

    Attributes:
      size: (height, width) to resize to.
      resample: how, by Pillow's number, as the file has it.
      crop: (height, width) to cut out of the middle; black is added around an image that is smaller.
      scale: factor of the pixels' values.
      mean_and_std: one number each for red, green and blue; subtracted, and divided by.
    """

    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float | None
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None

    @property
    def output(self) -> tuple[int, int] | None:
        """(height, width) of what comes out; None where every image keeps its own size."""
        return self.crop or self.size


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
    require_pillow()
    from PIL import Image

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
    if todo.crop is not None:
        height, width = todo.crop
        left, upper = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, upper, left + width, upper + height))
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
    if given.get("do_pad"):
        _refuse("do_pad", given["do_pad"], "a ViT's images are resized, cropped, rescaled and normalised, not padded")
    processor = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    is_deit, is_fast = processor.startswith("DeiT"), processor.endswith("Fast")
    said = {name: value for name, value in given.items() if value is not None or not (is_fast or name in _NULLABLE)}
    settings = {**(_DEIT if is_deit else _VIT), **said}
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if settings[name] is not None and not isinstance(settings[name], bool):
            _refuse(name, settings[name], "give true or false")
    scale = settings["rescale_factor"]
    if settings["do_rescale"] and not _is_number(scale):
        _refuse("rescale_factor", scale, "give a number")
    margin = _DEIT_MARGIN if is_deit and settings["do_center_crop"] else 1
    sizes = {"size": [round(side * margin) for side in config.image_hw], "crop_size": config.image_hw, **said}
    return Steps(
        size=_size("size", sizes["size"]) if settings["do_resize"] else None,
        resample=settings["resample"] if settings["do_resize"] else 0,
        crop=_size("crop_size", sizes["crop_size"]) if settings["do_center_crop"] else None,
        scale=scale if settings["do_rescale"] else None,
        mean_and_std=_mean_and_std(settings) if settings["do_normalize"] else None,
    )


def explicit(config: ViTConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` with which transformers does what `steps` says.

    Where the checkpoint has none, this is all of it. Where it has one, the sizes that it leaves to the model are added:
    transformers would take its own.

    Raises:
      ConfigError: `preprocessor` asks for something unknown.
    """
    todo, given = steps(config), config.preprocessor
    # Grey images become RGB, as they do here.
    alone = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, **_VIT}
    written = dict(alone if given is None else given)
    for name, size in (("size", todo.size), ("crop_size", todo.crop)):
        if size is not None and written.get(name) is None:
            written[name] = {"height": size[0], "width": size[1]}
    return written


def for_size(config: ViTConfig, height: int, width: int) -> dict[str, Any] | None:
    """The same preprocessing for images of another size; what is cropped is the same part of the resized image.

    Args:
      config: the configuration before the change.
      height: of the model's images after it, in pixels.
      width: likewise.

    Raises:
      ConfigError: `preprocessor` asks for something unknown.
    """
    if config.preprocessor is None:
        return None
    todo = steps(config)
    if todo.crop is None:
        return {**config.preprocessor, "size": {"height": height, "width": width}}
    changed: dict[str, Any] = {"crop_size": {"height": height, "width": width}}
    if todo.size is not None:
        ratios = (resized / cropped for resized, cropped in zip(todo.size, todo.crop, strict=True))
        sides = (round(side * ratio) for side, ratio in zip((height, width), ratios, strict=True))
        changed["size"] = dict(zip(("height", "width"), sides, strict=True))
    return {**config.preprocessor, **changed}


def _refuse(name: str, value: Any, advice: str) -> NoReturn:
    raise ConfigError(f"preprocessor_config.json: {name} is {value!r}: {advice}")


def _size(name: str, value: Any) -> tuple[int, int]:
    """(height, width) from an int, as in the files of old feature extractors, a pair, or a mapping of exactly these."""
    if isinstance(value, Mapping):
        sides = [value["height"], value["width"]] if value.keys() == {"height", "width"} else []
    else:
        sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or any(not _is_side(side) for side in sides):
        _refuse(name, value, "give a height and a width in pixels; a ViT's images have both, no shortest_edge")
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
