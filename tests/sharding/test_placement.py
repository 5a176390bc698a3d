"""Does each device hold only its own part of a checkpoint, at any time, and is the saved model the same?"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.sharding.ways import CASE, WAYS, Way
from vit_ref.model.skeleton import list_parameters
from vit_ref.weights.partition import LEAST

pytestmark = pytest.mark.xdist_group("devices")

SHAPES = list_parameters(CASE.config)
TENSORS = CASE.checkpoint().tensors


def part(path: str, way: Way) -> tuple[int, ...]:
    """Returns the shape of a device's part by Megatron's and FSDP's rule, written apart from the package's table."""
    shape = list(SHAPES[path])
    layer = path.split(".")[-2] if "." in path else path
    if "tensor" in way.sharding:
        if layer in ("query", "key", "value", "fc1"):
            shape[-1] //= way.model
        if path.endswith(("out.kernel", "fc2.kernel")):
            shape[0] //= way.model
    # Only query's kernel and those like it have two dimensions as wide as the stream.
    if "fsdp" in way.sharding and math.prod(SHAPES[path]) >= LEAST:
        stream = 1 if layer in ("out", "fc2") else SHAPES[path].index(CASE.config.hidden_size)
        shape[stream] //= way.data
    return tuple(shape)


@pytest.mark.parametrize("way", WAYS)
def test_each_device_holds_its_part_of_each_parameter(way: str, measured: dict[str, Any]) -> None:
    shards = measured[way]["load"]["shards"]
    assert shards.keys() == SHAPES.keys()
    for path, found in shards.items():
        expected = part(path, WAYS[way])
        assert found == [[list(expected), 4 * math.prod(expected)]] * 8, path


@pytest.mark.parametrize("way", WAYS)
def test_no_device_ever_holds_more(way: str, measured: dict[str, Any]) -> None:
    own = sum(4 * math.prod(part(path, WAYS[way])) for path in SHAPES)
    load = measured[way]["load"]
    assert load["peak"] == [own] * 8
    # In the order of the files' names, with at most a part of each parameter at once.
    assert sorted(load["placed"]) == sorted(
        [list(SHAPES[path]), 4 * math.prod(part(path, WAYS[way]))] for path in SHAPES
    )


def test_what_is_divided_is_less() -> None:
    bytes_of = {way: sum(math.prod(part(path, WAYS[way])) for path in SHAPES) for way in WAYS}
    whole = sum(map(math.prod, SHAPES.values()))
    assert bytes_of["data-8x1"] == whole
    assert all(size < whole / 3 for way, size in bytes_of.items() if way != "data-8x1")


@pytest.mark.parametrize("way", WAYS)
def test_the_host_reads_each_tensor_once_and_holds_one(way: str, measured: dict[str, Any]) -> None:
    load = measured[way]["load"]
    assert load["asked"] == dict.fromkeys(TENSORS, 1)
    assert load["alive"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_from_shards_has_the_bytes_of_one_devices(way: str, measured: dict[str, Any]) -> None:
    # Several files of weights, their index, and the configuration.
    assert len(measured["one"]) > 4
    assert measured[way]["saved"] == measured["one"]
