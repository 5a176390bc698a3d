"""Batches of images, loaded by grain: the same batches in the same order, however they are loaded.

Each image is a function of (seed, epoch, index) alone, see `draw`. Threads, worker processes and shards do not change
it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import InputError
from vit_ref.extras import extra
from vit_ref.finetune.augmentation import Augmentation, Transform, augment_image
from vit_ref.finetune.data import ImageDataset, Photograph
from vit_ref.finetune.metrics import PADDING
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import preprocess, steps

if TYPE_CHECKING:
    import grain  # type: ignore[import-untyped]

# Each (B, ...), see `Batches`.
Batch = dict[str, NDArray]

# Pillow decodes and resizes without Python's lock, so threads help. Each thread holds a batch in memory.
_THREADS = min(4, os.cpu_count() or 1)
_BATCHES_OF_A_WORKER = 2


def draw(
    dataset: ImageDataset,
    config: ViTConfig,
    augment: Augmentation | Transform | None,
    seed: int,
    epoch: int,
    index: int,
) -> NDArray:
    """Returns one image as the model sees it in one epoch.

    Args:
      dataset: the data set of the image.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.
      augment: `Augmentation`, a transform of Pillow's images, or None to leave images as they are.
      seed: seed of order and augmentation, from 0 to 2**32 - 1.
      epoch: number of the epoch, from 0.
      index: index of the image in the data set.

    Returns:
      The preprocessed image (height, width, 3), float32.

    Raises:
      InputError: the image cannot be read, or its size after the preprocessing does not fit the model.
    """
    return _pixels(dataset[index], config, augment, np.random.default_rng((seed, epoch, index)))


def _pixels(
    photograph: Photograph, config: ViTConfig, augment: Augmentation | Transform | None, rng: np.random.Generator
) -> NDArray:
    todo = steps(config)
    image, size = photograph.image, todo.output or config.image_hw
    if augment is not None:
        image = augment_image(augment, image, rng, size)
        if todo.crop is not None and image.size == size[::-1]:
            # A random crop replaces the central one. A second crop would cut away more.
            uncut = {**(config.preprocessor or {}), "do_resize": False, "do_center_crop": False}
            config = dataclasses.replace(config, preprocessor=uncut)
    # Without a crop the image is resized to the size that it has already, which changes nothing.
    pixels: NDArray = preprocess([image], config)[0]
    if pixels.shape[:2] != size:
        given, needed = (f"{height}x{width}" for height, width in (pixels.shape[:2], size))
        raise InputError(
            f"{photograph.name}: it has {given} pixels, the model takes {needed}, and do_resize is false: resize it, or"
            " set do_resize in preprocessor_config.json"
        )
    return pixels


class Batches(Iterator[Batch]):
    """Iterator of batches, from `load_batches`, that can continue from any batch.

    A batch is a dictionary: "pixels", (B, height, width, 3), float32; "label", "index" of the image in the data set,
    and "epoch", each (B,), int32. Unlike grain's own state, neither the batches nor the state depend on `num_workers`.
    If there are workers, end the iterator with `close()`.
    """

    def __init__(self, source: grain.MapDataset[Batch], num_workers: int):
        self._source, self._num_workers = source, num_workers
        self._done = 0
        self._loaded: grain.DatasetIterator[Batch] | None = None

    def __len__(self) -> int:
        return len(self._source)

    def __next__(self) -> Batch:
        if self._done == len(self):
            self.close()
            raise StopIteration
        if self._loaded is None:
            self._loaded = _started(self._source[self._done :], self._num_workers)
        batch = next(self._loaded)
        self._done += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the state: how many batches the iterator has returned."""
        return {"batches": self._done}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues from a state, with the same batches to the last bit.

        Args:
          state: the result of `get_state` of an iterator with the same arguments. `num_workers` may differ.

        Raises:
          InputError: the state does not belong to such an iterator.
        """
        done = state.get("batches")
        if not isinstance(done, int) or not 0 <= done <= len(self):
            raise InputError(
                f"{dict(state)} is not a state of a loader of {len(self)} batches: give the state of the same loader"
            )
        self.close()
        self._done = done

    def close(self) -> None:
        """Ends threads and workers. The next batch starts them again."""
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None


def _started(source: grain.MapDataset[Batch], num_workers: int) -> grain.DatasetIterator[Batch]:
    grain = extra("grain", "loading batches")
    threads = 0 if num_workers else _THREADS
    loaded = source.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if num_workers:
        # grain reads flags of absl, which are parsed only in programs that absl itself started.
        flags = extra("absl.flags", "loading batches").FLAGS
        if not flags.is_parsed():
            flags.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=_BATCHES_OF_A_WORKER)
        loaded = loaded.mp_prefetch(options)
    return iter(loaded)


def load_batches(
    dataset: ImageDataset,
    config: ViTConfig,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    augment: Augmentation | Transform | None = None,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    shuffle: bool = True,
    drop_remainder: bool = True,
) -> Batches:
    """Returns the batches of all epochs, one after another. No batch mixes images of two epochs.

    Args:
      dataset: the images.
      config: the model's configuration, with the checkpoint's `preprocessor` if it has one.
      batch_size: number of images in a batch of this process.
      seed: seed of order and augmentation, from 0 to 2**32 - 1.
      epochs: number of passes over the images.
      augment: `Augmentation`, or a function from Pillow's image to an image, see `augmentation.augment_image`; None to
        leave images as they are.
      num_workers: number of processes that load images; 0 for threads of this process.
      shard: (index, count) of this process among those that share the data set. Each image goes to one process, and all
        processes have the same number of batches.
      shuffle: whether every epoch has an order of its own.
      drop_remainder: whether to leave out the images that fill no batch of every shard; they differ from epoch to
        epoch.
        Otherwise they come in batches filled up with images of zeros, with label and index -1.

    Raises:
      InputError: an argument is out of range, there are fewer images than one batch takes, or grain is missing. While
        iterating: an image cannot be read, or does not fit the model.
    """
    grain = extra("grain", "loading batches")
    here, shards = shard
    for name, value, least in (("batch_size", batch_size, 1), ("epochs", epochs, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(f"{name} is {value}: give at least {least}")
    if not 0 <= here < shards:
        raise InputError(f"shard is {here} of {shards}: give an index from 0 to {shards - 1}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: give an integer from 0 to 2**32 - 1")
    each = count_batches(len(dataset), batch_size, shards=shards, drop_remainder=drop_remainder) * batch_size
    if not each:
        raise InputError(
            f"batch_size is {batch_size} for each of {shards} shards: there are only {len(dataset)} images: give less"
        )

    def load(position: int, index: int) -> dict[str, Any]:
        epoch = position // each
        if index >= len(dataset):
            pixels, label, index = (
                np.zeros((*(steps(config).output or config.image_hw), 3), np.float32),
                PADDING,
                PADDING,
            )
        else:
            photograph = dataset[index]
            label = photograph.label
            pixels = _pixels(photograph, config, augment, np.random.default_rng((seed, epoch, index)))
        return {
            "pixels": pixels,
            "label": np.int32(label),
            "index": np.int32(index),
            "epoch": np.int32(epoch),
        }

    source = grain.MapDataset.range(len(dataset))
    if shuffle:
        source = source.map_with_index(lambda position, _: _shuffled(len(dataset), seed, position))
    if each * shards > len(dataset):
        source = grain.MapDataset.concatenate([source, grain.MapDataset.range(len(dataset), each * shards)])
    # Batches are cut before workers share them out, so they are the same for any number of workers.
    return Batches(
        source[here : each * shards : shards].map_with_index(load).batch(batch_size).repeat(epochs), num_workers
    )


def _shuffled(count: int, seed: int, position: int) -> int:
    """Returns the index of the image at a position. Positions count on from epoch to epoch."""
    epoch, place = divmod(position, count)
    return int(_order(count, seed, epoch)[place])


# grain's own shuffle needs no memory. But it works on at least 16 bits, so with few images it takes far longer to find
# an image than to load it.
@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # No image has the index `count`, so no image draws the same numbers. (seed, epoch) alone would be those of image 0.
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def count_batches(images: int, batch_size: int, *, shards: int = 1, drop_remainder: bool = True) -> int:
    """Counts the batches that each of `shards` processes has in one epoch.

    Args:
      images: number of images in the data set.
      batch_size: number of images in a batch of one process.
      shards: number of processes that share the data set.
      drop_remainder: whether to leave out the images that fill no batch of every shard.
    """
    whole, rest = divmod(images, batch_size * shards)
    return whole + bool(rest and not drop_remainder)
