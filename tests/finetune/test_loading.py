"""Does every image come once an epoch, the same for any loader and from any point of continuation?"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vit_ref.errors import InputError
from vit_ref.finetune.augmentation import Augmentation
from vit_ref.finetune.data import ImageDataset, open_dataset
from vit_ref.finetune.loading import PADDING, Batch, count_batches, draw, load_batches
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import preprocess

pytest.importorskip("grain")

CONFIG = ViTConfig(image_size=(6, 9), patch_size=3, preprocessor={"image_mean": [0.4, 0.5, 0.6], "image_std": 0.3})
COUNT, BATCH, EPOCHS = 23, 4, 3
AUGMENT = Augmentation()


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    pixels = np.random.default_rng(0).integers(256, size=(COUNT, 10, 12, 3), dtype=np.uint8)
    names = tuple(f"image {k}" for k in range(COUNT))
    return ImageDataset(
        ("ant", "bee", "cat"), names, np.arange(COUNT) % 3, np.arange(COUNT), tuple(map(Image.fromarray, pixels))
    )


def loader(dataset: ImageDataset, **arguments: Any) -> Any:
    defaults = {"batch_size": BATCH, "seed": 5, "epochs": EPOCHS, "augment": AUGMENT}
    return load_batches(dataset, CONFIG, **{**defaults, **arguments})


def indices(loaded: Iterable[Batch]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loaded]


def by_epoch(loaded: Iterable[Batch]) -> list[list[int]]:
    """Returns the indices of each epoch, in order. A batch with images of two epochs fails here."""
    found: list[list[int]] = [[] for _ in range(EPOCHS)]
    for batch in loaded:
        (epoch,) = np.unique(batch["epoch"])
        found[epoch] += batch["index"].tolist()
    return found


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_batch_has_the_shapes_and_dtypes_that_a_model_takes(dataset: ImageDataset) -> None:
    batch = next(loader(dataset))
    found = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    each = ((BATCH,), "int32")
    assert found == {"pixels": ((BATCH, 6, 9, 3), "float32"), "label": each, "index": each, "epoch": each}


def test_every_image_depends_on_seed_epoch_and_index_alone(dataset: ImageDataset) -> None:
    for batch in loader(dataset):
        for k in range(BATCH):
            index, epoch = int(batch["index"][k]), int(batch["epoch"][k])
            assert batch["pixels"][k].tobytes() == draw(dataset, CONFIG, AUGMENT, 5, epoch, index).tobytes()
            assert batch["label"][k] == dataset[index].label


@pytest.mark.parametrize("other", [{"seed": 6}, {"epoch": 2}, {"index": 8}])
def test_an_image_changes_with_seed_epoch_and_index(dataset: ImageDataset, other: dict[str, int]) -> None:
    # One image in two epochs, which differ only by the augmentation.
    twice = dataclasses.replace(dataset, rows=np.zeros_like(dataset.rows))
    place = {"seed": 5, "epoch": 1, "index": 7}
    first, second = (draw(twice, CONFIG, AUGMENT, **{**place, **changes}) for changes in ({}, other))
    assert (first != second).any()


def test_an_epoch_is_a_permutation_that_drops_different_images(dataset: ImageDataset) -> None:
    epochs = by_epoch(loader(dataset))
    for order in epochs:
        assert len(set(order)) == len(order) == COUNT - COUNT % BATCH
        # 20 images stay in order by chance with probability 1 / 20!
        assert order != sorted(order)
    # Each pair of epochs leaves out the same 3 of 23 with probability 1 / 1771.
    assert len({frozenset(order) for order in epochs}) == EPOCHS
    assert len({tuple(order) for order in epochs}) == EPOCHS


def test_the_order_is_the_seeds(dataset: ImageDataset) -> None:
    orders = [by_epoch(loader(dataset, seed=seed, augment=None)) for seed in (5, 5, 6, 4)]
    assert orders[0] == orders[1]
    # The epochs of one seed are not those of the next seed, one later.
    assert not {tuple(order) for order in orders[0]} & {tuple(order) for order in orders[2] + orders[3]}


def test_every_image_comes_in_every_place_equally_often(dataset: ImageDataset) -> None:
    small = dataclasses.replace(dataset, names=dataset.names[:8], labels=dataset.labels[:8], rows=dataset.rows[:8])
    epochs = 800
    order = np.array(indices(loader(small, batch_size=8, epochs=epochs, augment=None)))
    counts = np.array([np.bincount(order[:, place], minlength=8) for place in range(8)])
    # 100 of each are expected, with standard deviation 9.4. 64 of them are all within 4.5 of these with probability
    # 0.9996.
    assert counts.sum() == 8 * epochs and np.abs(counts - 100).max() < 42


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_have_different_images_and_as_many_batches(dataset: ImageDataset, shards: int) -> None:
    each = [by_epoch(loader(dataset, shard=(k, shards))) for k in range(shards)]
    for epoch in range(EPOCHS):
        together = [index for shard in each for index in shard[epoch]]
        assert len(set(together)) == len(together) == shards * BATCH * (COUNT // (shards * BATCH))
        assert len({len(shard[epoch]) for shard in each}) == 1


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_has_each_image_once_and_pads_the_last_batch(
    dataset: ImageDataset, shards: int, shuffle: bool
) -> None:
    arguments = {"shuffle": shuffle, "drop_remainder": False, "augment": None}
    each = [list(loader(dataset, shard=(k, shards), **arguments)) for k in range(shards)]
    per_epoch = count_batches(COUNT, BATCH, shards=shards, drop_remainder=False)
    assert [len(loaded) for loaded in each] == [EPOCHS * per_epoch] * shards
    assert {batch["pixels"].shape for loaded in each for batch in loaded} == {(BATCH, 6, 9, 3)}
    for epoch in range(EPOCHS):
        together = [index for loaded in each for index in by_epoch(loaded)[epoch]]
        padding = shards * BATCH * per_epoch - COUNT
        assert sorted(together) == [PADDING] * padding + list(range(COUNT))
    for batch in (batch for loaded in each for batch in loaded):
        filled = batch["index"] == PADDING
        assert ((batch["label"] == PADDING) == filled).all()
        assert not batch["pixels"][filled].any()


def test_without_shuffle_images_come_in_order_and_preprocessed(dataset: ImageDataset) -> None:
    (first, *_) = loader(dataset, shuffle=False, augment=None, epochs=1)
    assert first["index"].tolist() == [0, 1, 2, 3]
    expected = preprocess([dataset[k].image for k in range(4)], CONFIG)
    assert first["pixels"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("done", [0, 1, 6, 15])
def test_loading_goes_on_from_a_state_to_the_last_bit(dataset: ImageDataset, done: int) -> None:
    before = loader(dataset)
    assert len(before) == 15
    list(islice(before, done))
    state = json.loads(json.dumps(before.get_state()))
    rest = list(before)
    after = loader(dataset)
    next(after)  # the iterator need not be a fresh one
    after.set_state(state)
    assert after.get_state() == state
    if done == 15:
        assert rest == list(after) == []
    else:
        assert_same(list(after), rest)


def test_workers_load_the_same_and_go_on_from_the_same_state(dataset: ImageDataset) -> None:
    alone = list(loader(dataset))
    together = loader(dataset, num_workers=2)
    together.set_state({"batches": 4})
    assert_same(list(islice(together, 5)), alone[4:9])
    state = together.get_state()
    together.close()
    after = loader(dataset)
    after.set_state(state)
    assert_same(list(after), alone[9:])


def test_any_callable_can_augment(dataset: ImageDataset) -> None:
    def noisy(image: Image.Image) -> NDArray:
        return np.clip(np.asarray(image) / 255 + np.random.normal(0, 0.1, (10, 12, 3)), 0, 1)  # noqa: NPY002

    first, again = (list(loader(dataset, augment=noisy)) for _ in range(2))
    assert_same(first, again)
    index, epoch = int(first[0]["index"][1]), int(first[0]["epoch"][1])
    assert first[0]["pixels"][1].tobytes() == draw(dataset, CONFIG, noisy, 5, epoch, index).tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_becomes_unreadable_on_the_way_is_named(tmp_path: Path, workers: int) -> None:
    for k in range(4):
        file = tmp_path / "ant" / f"{k}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    dataset = open_dataset(tmp_path, "train")
    os.truncate(dataset.names[1], 20)
    loaded = loader(dataset, batch_size=3, num_workers=workers)
    with pytest.raises(InputError, match="not a readable image") as caught:
        next(loaded)
    loaded.close()
    assert str(caught.value).startswith(dataset.names[1]) and "\n" not in str(caught.value)


def test_images_of_another_size_are_refused_without_a_resize(dataset: ImageDataset) -> None:
    config = dataclasses.replace(CONFIG, preprocessor={"do_resize": False})
    assert draw(dataset, config, AUGMENT, 0, 0, 0).shape == (6, 9, 3)
    with pytest.raises(InputError, match="image 3: it has 10x12 pixels, the model takes 6x9, and do_resize is false"):
        draw(dataset, config, None, 0, 0, 3)


def test_a_random_crop_takes_the_place_of_the_checkpoints(dataset: ImageDataset) -> None:
    cropping = {**CONFIG.preprocessor, "do_center_crop": True, "size": [8, 12], "crop_size": [6, 9]}
    config = dataclasses.replace(CONFIG, preprocessor=cropping)
    # An augmented image has the size that the model takes, and is cropped once.
    assert draw(dataset, config, AUGMENT, 0, 0, 3).tobytes() == draw(dataset, CONFIG, AUGMENT, 0, 0, 3).tobytes()
    # Without augmentation, or after a transform that keeps the size, the checkpoint's own crop is made.
    middle = preprocess([dataset[3].image], config)[0]
    assert middle.shape == (6, 9, 3)
    assert draw(dataset, config, None, 0, 0, 3).tobytes() == middle.tobytes()
    assert draw(dataset, config, lambda image: image, 0, 0, 3).tobytes() == middle.tobytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 24}, "batch_size is 24 for each of 1 shards: there are only 23 images"),
        ({"batch_size": 12, "shard": (0, 2)}, "batch_size is 12 for each of 2 shards: there are only 23 images"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"shard": (2, 2)}, "shard is 2 of 2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_arguments_out_of_range_are_refused(dataset: ImageDataset, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        loader(dataset, **arguments)


@pytest.mark.parametrize("state", [{"batches": 16}, {"batches": -1}, {"next_index": 3}])
def test_a_state_of_something_else_is_refused(dataset: ImageDataset, state: dict[str, int]) -> None:
    with pytest.raises(InputError, match="is not a state of a loader of 15 batches"):
        loader(dataset).set_state(state)
