"""Preprocessing of images as a checkpoint's `preprocessor_config.json` says.

The steps make an image upright and RGB, then resize, crop, rescale and normalise it. The arithmetic is that of
transformers' `ViTImageProcessor`. It is that of `DeiTImageProcessor` if the file names that class or has a crop. Order
and dtypes are theirs too, so the result is equal to the last bit, with only Pillow and NumPy. The exceptions are:

- The EXIF orientation is followed, so photographs come upright. `ViTImageProcessor` ignores it.
- Every image becomes RGB, as under `do_convert_rgb`: grey is repeated, palettes are looked up, alpha is dropped and not
  blended. Without that flag `ViTImageProcessor` refuses images without three channels.
- 16-bit grey keeps its high byte, as Pillow reads 16-bit colour. Pillow's conversion of grey, which `ViTImageProcessor`
  uses, makes every value above 255 white. 32-bit grey has no known white and is refused.
- Images of one or three rows are accepted. `ViTImageProcessor` takes their height for the channels.
- Without a `size`, images get the model's own size, not 224. Without a `crop_size`, the crop has the model's size. If
  DeiT's file has no `size` either, images are resized to 256/224 of it.
- `do_center_crop` is followed in every file. `ViTImageProcessor` silently ignores it.
- `do_pad` is refused. `ViTImageProcessor` silently ignores it.
- The result is always float32. Without rescaling and normalisation, that of `ViTImageProcessor` is uint8.

A step that is null, such as `do_rescale: null`, is left out, as these classes of transformers 4 do. If the file names a
fast processor, such as `ViTImageProcessorFast`, null means the default, as it does to that processor.
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
# The settings of ViTImageProcessor if the file does not have them. The sizes follow from the model.
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
# DeiT's images are resized to this multiple of the crop.
_DEIT_MARGIN = 256 / 224
# Null means the default for these, whichever processor the file names.
_NULLABLE = ("size", "crop_size", "image_mean", "image_std")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of the preprocessing, in their order. A step that is left out is None.

    Attributes:
      size: (height, width) in pixels to resize to.
      resample: Pillow's number of the resampling method, as in the file.
      crop: (height, width) in pixels of the central crop. A smaller image gets a black border.
      scale: factor of the pixel values.
      mean_and_std: (mean, standard deviation), each for red, green and blue. The mean is subtracted, and the difference
        divided by the deviation.
    """

    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float | None
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None

    @property
    def output(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the result, or None if every image keeps its size."""
        return self.crop or self.size


def preprocess(images: Sequence[str | os.PathLike[str] | Image.Image], config: ViTConfig) -> NDArray:
    """Turns images into the array that the model takes.

    Args:
      images: files, or Pillow's images.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Returns:
      The pixels (len(images), height, width, 3), float32.

    Raises:
      InputError: an image cannot be read, images that are not resized differ in size, the model does not take colour
        images, or Pillow is missing.
      ConfigError: `preprocessor` has an unknown setting.
    """
    require_pillow()
    from PIL import Image

    if config.num_channels != 3:
        raise InputError(
            f"the model takes {config.num_channels} channels, and RGB images have 3: give a model of colour images"
        )
    if not images:
        raise InputError("there are no images: give at least one")
    todo = steps(config)
    if todo.size is not None:
        _require_resampling(todo.resample)
    batch: list[NDArray] = []
    for i, image in enumerate(images):
        name = f"image {i}" if isinstance(image, Image.Image) else os.fspath(image)
        batch.append(_apply(todo, read_image(image, name)))
        if batch[-1].shape != batch[0].shape:
            size, first = (f"{array.shape[0]}x{array.shape[1]}" for array in (batch[-1], batch[0]))
            raise InputError(
                f"{name}: it has {size} pixels, the first image has {first}, and do_resize is false: give images of one"
                " size"
            )
    return np.stack(batch)


def read_image(source: str | os.PathLike[str] | IO[bytes] | Image.Image, name: str) -> Image.Image:
    """Reads one image, upright and RGB.

    Args:
      source: a file, by name or open, or an image of Pillow.
      name: name of the image in an error.

    Returns:
      An RGB image of Pillow.

    Raises:
      InputError: the image cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(source) as image:
            return _upright_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    # For damaged bytes Pillow's decoders raise OSError, SyntaxError, ValueError, TypeError, struct.error and others.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{name}: not a readable image ({reason})") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    # Pillow before 11.0 opens a 16-bit PNG in mode "I", which elsewhere means 32 bits.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"32-bit grey (mode {image.mode}) has no known white: save it as 8-bit grey")
    if image.mode == "P":
        # A direct conversion to RGB gives the same colours, but Pillow warns that it drops the palette's alpha.
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
    """Returns the preprocessing steps of a checkpoint. Only `preprocess` checks that Pillow has the `resample`.

    Args:
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Raises:
      ConfigError: `preprocessor` has an unknown setting.
    """
    given = config.preprocessor or {}
    if given.get("do_pad"):
        _refuse("do_pad", given["do_pad"], "remove it, because a ViT's images are never padded")
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
    """Returns the `preprocessor_config.json` with which transformers does the same as `steps`.

    Without a file in the checkpoint this is the whole content. Otherwise it adds the sizes that the file leaves to the
    model, because transformers would take its own.

    Args:
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.

    Raises:
      ConfigError: `preprocessor` has an unknown setting.
    """
    todo, given = steps(config), config.preprocessor
    # Grey images become RGB, as they do in this module.
    alone = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, **_VIT}
    written = dict(alone if given is None else given)
    for name, size in (("size", todo.size), ("crop_size", todo.crop)):
        if size is not None and written.get(name) is None:
            written[name] = {"height": size[0], "width": size[1]}
    return written


def for_size(config: ViTConfig, height: int, width: int) -> dict[str, Any] | None:
    """Returns the same preprocessing for images of another size. The crop keeps its share of the resized image.

    Args:
      config: the configuration before the change.
      height: new height of the model's images, in pixels.
      width: new width of the model's images, in pixels.

    Returns:
      The new `preprocessor_config.json`, or None if the checkpoint has none.

    Raises:
      ConfigError: `preprocessor` has an unknown setting.
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
    """Reads (height, width) from an int, as in the files of old feature extractors, a pair, or a mapping of both."""
    if isinstance(value, Mapping):
        sides = [value["height"], value["width"]] if value.keys() == {"height", "width"} else []
    else:
        sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or any(not _is_side(side) for side in sides):
        _refuse(name, value, "give a height and a width in pixels; shortest_edge does not fit a ViT")
    return sides[0], sides[1]


def _is_side(value: Any) -> bool:
    # Pillow counts the bytes of a row in 32 bits.
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**16


def _require_resampling(value: Any) -> None:
    from PIL import Image

    if not isinstance(value, int) or isinstance(value, bool) or value not in list(Image.Resampling):
        known = ", ".join(f"{method.value} {method.name.lower()}" for method in sorted(Image.Resampling))
        _refuse("resample", value, f"give one of {known}")


def _mean_and_std(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    both = []
    for name in ("image_mean", "image_std"):
        value = settings[name]
        values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        if len(values) != 3 or not all(_is_number(each) for each in values):
            _refuse(name, value, "give a number, or one for each of red, green and blue")
        both.append(tuple(map(float, values)))
    if not np.array(both[1], np.float32).all():
        _refuse("image_std", settings["image_std"], "give no zero, because pixels are divided by it")
    return both[0], both[1]


def _is_number(value: Any) -> bool:
    """Tells whether a value is a number that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
