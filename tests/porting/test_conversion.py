"""Is a converted checkpoint the same model to the last bit, and one that cannot be the same never written?"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.vit_strategies import random_bits, with_room, within
from vit_ref.errors import CheckpointError, ConfigError, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES
from vit_ref.weights import checkpoint, conversion, layouts, mapping, pretrained, writing
from vit_ref.weights.conversion import Target, convert
from vit_ref.weights.layouts import LAYOUTS

LABELS = ("cat", "dog", "dog")
PREPROCESSOR = {"image_mean": [0.4, 0.5, 0.6], "image_std": 0.25, "resample": 3}
# The numerics that the readers of every layout assume: epsilon 1e-6, tanh GELU, biases, squares.
CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=7,
    hidden_act="gelu_new",
    layer_norm_eps=1e-6,
    image_size=8,
    patch_size=4,
    num_labels=3,
    labels=LABELS,
    preprocessor=PREPROCESSOR,
)
TARGETS = ("hf", "flax", "npz", "big_vision", "timm")
targets = pytest.mark.parametrize("to", TARGETS)


def write(place: Path, config: ViTConfig, parameters: dict[str, NDArray]) -> Path:
    writing.write_directory(place, mapping.export(parameters, config, layouts.HF), config.to_hf(), config.preprocessor)
    return place


def place(folder: Path, to: str) -> Path:
    return folder / (f"{to}.npz" if to in ("npz", "big_vision") else to)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint that every layout can store."""
    return write(tmp_path / "source", CONFIG, with_room(layouts.BIG_VISION, random_bits(CONFIG, np.float32)))


def refusal(source: Path, destination: Path, to: Any, error: type[Exception] = CheckpointError, **options: Any) -> str:
    """Returns the error, and checks that nothing was written."""
    folder = destination.parent
    before = sorted(folder.iterdir())
    with pytest.raises(error) as caught:
        convert(source, destination, to, **options)
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


def bits(parameters: mapping.Tensors) -> dict[str, tuple]:
    return {path: (value.dtype, value.shape, value.tobytes()) for path, value in parameters.items()}


@pytest.mark.parametrize("keys", [(), ("torch_dtype",), ("dtype",), ("torch_dtype", "dtype")])
def test_the_configuration_states_the_dtype_of_the_tensors(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Checks the dtype, because transformers rounds to the one that the configuration states."""
    config = replace(CONFIG, extra=dict.fromkeys(keys, "bfloat16"))
    source = write(tmp_path / "source", config, random_bits(config, np.float32))
    for to in ("hf", "flax"):
        said = json.loads((convert(source, tmp_path / to, to).destination / checkpoint.CONFIG).read_bytes())
        found = {key: said[key] for key in ("torch_dtype", "dtype") if key in said}
        assert found == dict.fromkeys(keys or ("torch_dtype",), "float32")


@pytest.mark.parametrize(
    ("dtypes", "said"),
    [
        ((ml_dtypes.bfloat16, ml_dtypes.bfloat16), "bfloat16"),
        ((ml_dtypes.bfloat16, np.float32), "float32"),
        ((np.float32, np.float64), "float64"),
        ((ml_dtypes.bfloat16, np.float16), "float32"),
    ],
)
def test_the_configuration_states_a_dtype_that_holds_all_tensors(dtypes: tuple[type, type], said: str) -> None:
    tensors = {str(i): np.zeros(1, dtype) for i, dtype in enumerate(dtypes)}
    assert pretrained.hf_config(CONFIG, tensors)["torch_dtype"] == said


@targets
@pytest.mark.parametrize("end", ["head", "pooler", "neither"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_bit_survives_there_and_back(tmp_path: Path, to: Target, dtype: type, end: str) -> None:
    heads: dict[str, dict[str, Any]] = {
        "head": {},
        "pooler": {"num_labels": 0, "labels": (), "pooler": True, "pooler_output_size": 5},
        "neither": {"num_labels": 0, "labels": (), "pooler_act": "relu", "pooler_output_size": 5},
    }
    layout = LAYOUTS[to]
    config = within(layout, replace(CONFIG, **heads[end]))
    parameters = with_room(layout, random_bits(config, dtype))
    source = write(tmp_path / "source", config, parameters)
    there = convert(source, place(tmp_path, to), to)
    assert (there.source, there.destination, there.read, there.written) == (source, place(tmp_path, to), "hf", to)
    found = checkpoint.read(there.destination)
    assert mapping.detect(found.tensors) is layout and len(found.tensors) == there.tensors
    back = convert(there.destination, tmp_path / "back", "hf")
    assert (back.read, back.written) == (to, "hf")
    again, values, _ = pretrained.load(checkpoint.read(tmp_path / "back"))
    assert bits(values) == bits(parameters)
    # gelu_new is another name of the tanh form. A model without a pooler has neither its width nor its activation.
    absent = {} if config.pooler else {"pooler_output_size": config.pooler_output_size, "pooler_act": config.pooler_act}
    assert replace(again, hidden_act="gelu_new", **absent) == config


@pytest.mark.parametrize("read", TARGETS)
@targets
def test_any_layout_becomes_any_other(tmp_path: Path, source: Path, read: Target, to: Target) -> None:
    first = convert(source, place(tmp_path / "first", read), read)
    second = convert(first.destination, place(tmp_path / "second", to), to)
    assert (second.read, second.written) == (read, to)
    _, meant, _ = pretrained.load(checkpoint.read(source))
    _, found, _ = pretrained.load(checkpoint.read(second.destination))
    assert bits(found) == bits(meant)


@pytest.mark.parametrize(
    ("to", "left_behind"),
    [
        ("hf", ()),
        ("flax", ()),
        ("timm", ("problem_type", "dropout rates")),
        ("npz", ("class names", "problem_type", "preprocessing", "dropout rates")),
        ("big_vision", ("class names", "problem_type", "preprocessing", "dropout rates")),
    ],
)
def test_what_travels_along_and_what_is_left_behind(tmp_path: Path, to: Target, left_behind: tuple[str, ...]) -> None:
    config = replace(CONFIG, hidden_dropout_prob=0.1, extra={"problem_type": "multi_label_classification"})
    source = write(tmp_path / "source", config, with_room(layouts.BIG_VISION, random_bits(config, np.float32)))
    done = convert(source, place(tmp_path, to), to)
    assert done.left_behind == left_behind
    again = pretrained.read_configuration(checkpoint.read(done.destination))
    assert again.labels == (() if "class names" in left_behind else LABELS)
    line = str(done)
    assert line.startswith(f"{source} (hf) -> {place(tmp_path, to)} ({to}): {done.tensors} tensors, read back, every")
    assert line.endswith(f"; the layout cannot store: {', '.join(left_behind)}" if left_behind else "to the last bit")


@pytest.mark.parametrize(
    ("preprocessor", "is_kept"),
    [
        (PREPROCESSOR, True),
        (None, True),
        ({"size": 8, "image_mean": [0.1, 0.2, 0.3]}, True),
        ({"size": {"height": 9, "width": 8}}, False),
        ({"do_resize": False}, False),
        ({"do_rescale": False}, False),
        ({"rescale_factor": 0.5}, False),
        ({"do_normalize": False}, False),
        ({"do_center_crop": True}, False),
        ({"resample": 5}, True),
        ({"resample": 6}, False),
    ],
)
def test_preprocessing_goes_to_timm_where_timm_has_its_like(
    tmp_path: Path, preprocessor: dict[str, Any] | None, is_kept: bool
) -> None:
    config = replace(CONFIG, preprocessor=preprocessor)
    done = convert(write(tmp_path / "source", config, random_bits(config, np.float32)), tmp_path / "timm", "timm")
    assert done.left_behind == (() if is_kept else ("preprocessing",))


def test_a_crop_is_written_for_timm_though_it_is_not_read_back(tmp_path: Path) -> None:
    height, width = CONFIG.image_hw
    preprocessor = {**PREPROCESSOR, "do_center_crop": True, "size": [2 * height, 2 * width]}
    config = replace(CONFIG, preprocessor=preprocessor)
    done = convert(write(tmp_path / "source", config, random_bits(config, np.float32)), tmp_path / "timm", "timm")
    written = json.loads((tmp_path / "timm" / "config.json").read_bytes())["pretrained_cfg"]
    # timm resizes to the image's size divided by crop_pct.
    assert (written["crop_pct"], written["crop_mode"]) == (0.5, "squash")
    assert done.left_behind == ("preprocessing",)


SPECIAL = {
    "hidden_act": {"hidden_act": "gelu"},
    "layer_norm_eps": {"layer_norm_eps": 1e-12},
    "qkv_bias": {"qkv_bias": False},
    "rectangle": {"image_size": (8, 12)},
    # The number of patches is that of a square.
    "disguised rectangle": {"image_size": (4, 16)},
    "patches": {"patch_size": (4, 2)},
    "pooler": {"num_labels": 0, "labels": (), "pooler": True},
    "pooler_act": {"num_labels": 0, "labels": (), "pooler": True, "pooler_act": "gelu"},
    "cls position": {},
}
NPZ_REFUSES = {
    "hidden_act": "its readers assume hidden_act 'gelu_pytorch_tanh' for 'gelu'",
    "layer_norm_eps": "its readers assume layer_norm_eps 1e-06 for 1e-12",
    "qkv_bias": "its readers assume qkv_bias True for False",
    "rectangle": "read back: its 6 positions are no square grid: give config=",
    "disguised rectangle": "its readers assume image_size (8, 8) for (4, 16)",
    "patches": "read back: its 8 positions are no square grid: give config=",
    "pooler_act": "its readers assume pooler_act 'tanh' for 'gelu'",
}
NO_POOLER = "pooler.bias: the layout has no name for it; pooler.kernel: the layout has no name for it"
REFUSES: dict[str, dict[str, str]] = {
    "hf": {},
    "flax": {
        "rectangle": "FlaxViT takes only squares, not (8, 12) and patches of (4, 4)",
        "disguised rectangle": "FlaxViT takes only squares, not (4, 16) and patches of (4, 4)",
        "patches": "FlaxViT takes only squares, not (8, 8) and patches of (4, 2)",
    },
    "npz": NPZ_REFUSES,
    "big_vision": {
        **NPZ_REFUSES,
        "cls position": (
            "position_embeddings: the cls token's position is not zero, and pos_embedding cannot store it"
        ),
    },
    "timm": {
        "layer_norm_eps": "its readers assume layer_norm_eps 1e-06 for 1e-12",
        "pooler": NO_POOLER,
        "pooler_act": NO_POOLER,
    },
}


@targets
@pytest.mark.parametrize("special", SPECIAL)
def test_a_layout_that_reads_as_another_model_is_not_written(tmp_path: Path, to: Target, special: str) -> None:
    config = replace(CONFIG, **SPECIAL[special])
    parameters = random_bits(config, np.float32)
    if special != "cls position":
        parameters = with_room(layouts.BIG_VISION, parameters)
    source = write(tmp_path / "source", config, parameters)
    destination = place(tmp_path, to)
    if special in REFUSES[to]:
        assert refusal(source, destination, to) == (
            f"{destination}: layout {to} cannot hold this checkpoint: {REFUSES[to][special]}:"
            " write layout hf, which can hold all"
        )
    else:
        convert(source, destination, to)
        again, values, _ = pretrained.load(checkpoint.read(destination))
        assert bits(values) == bits(parameters)
        # An activation has two names, and the width of a pooler may have its default.
        assert replace(again, hidden_act=config.hidden_act, pooler_output_size=None) == config
        assert again.hidden_act in (config.hidden_act, "gelu_pytorch_tanh")


def test_other_numerics_are_written_where_they_are_stated(tmp_path: Path) -> None:
    config = replace(CONFIG, layer_norm_eps=1e-12)
    source = write(tmp_path / "source", config, random_bits(config, np.float32))
    assert "layer_norm_eps 1e-06 for 1e-12" in refusal(source, tmp_path / "timm", "timm")
    convert(source, tmp_path / "timm", "timm", config=replace(config, layer_norm_eps=1e-6))
    assert pretrained.read_configuration(checkpoint.read(tmp_path / "timm")).layer_norm_eps == 1e-6


@targets
def test_what_exists_is_not_overwritten(tmp_path: Path, source: Path, to: Target) -> None:
    destination = place(tmp_path, to)
    destination.mkdir()
    assert refusal(source, destination, to) == (
        f"{destination}: it exists already, and is not overwritten: give another name"
    )
    assert not list(destination.iterdir())


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_file_is_not_put_beside_the_configuration_of_another(tmp_path: Path, source: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert refusal(source, tmp_path / "vit.npz", "npz") == (
        f"{tmp_path / 'vit.npz'}: a reader would take the {name} in this directory for this file's: name a file"
        " in a directory without one"
    )


def test_a_destination_or_layout_that_is_none(tmp_path: Path, source: Path) -> None:
    given = tmp_path / "vit"
    assert refusal(source, given, "npz") == f"{given}: the layout npz is one file: name it {given}.npz"
    given = tmp_path / "vit.npz"
    assert refusal(source, given, "timm") == f"{given}: the layout timm is a directory: give a name without .npz"
    assert refusal(source, tmp_path / "vit", "torch") == (
        "layout is 'torch': give one of hf, flax, npz, big_vision, timm"
    )
    assert ": it cannot be written ([Errno 36] File name too long: " in refusal(source, tmp_path / ("v" * 300), "hf")


@targets
def test_a_directory_that_is_not_there_is_made(tmp_path: Path, source: Path, to: Target) -> None:
    destination = place(tmp_path / "a" / "b", to)
    convert(source, destination, to)
    assert list(destination.parent.iterdir()) == [destination]


def test_an_unusable_source_is_refused_as_by_from_pretrained(tmp_path: Path, source: Path) -> None:
    config = checkpoint.read(source).config or {}
    writing.write_json(source / "config.json", {**config, "model_type": "deit"})
    message = refusal(source, tmp_path / "timm", "timm", ConfigError)
    assert message.startswith(f"{source / 'config.json'}: model_type is 'deit', ")
    writing.write_json(source / "config.json", {**config, "num_hidden_layers": 1})
    assert "16 unexpected" in refusal(source, tmp_path / "timm", "timm", MappingError)
    convert(source, tmp_path / "shorter", "timm", ignore=["vit.encoder.layer.1.*"])
    assert len(checkpoint.read(tmp_path / "shorter").tensors) == 8 + 12


@pytest.mark.parametrize(("to", "is_sharded"), [("hf", True), ("timm", False)])
def test_large_weights_are_sharded_except_for_timm(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, to: Target, is_sharded: bool
) -> None:
    small = functools.partial(writing.write_directory, max_shard_size=900)
    monkeypatch.setattr(writing, "write_directory", small)
    written = convert(source, tmp_path / to, to).destination
    assert ((written / checkpoint.INDEX).exists(), (written / checkpoint.WEIGHTS).exists()) == (
        is_sharded,
        not is_sharded,
    )


def _first_bit_turned(tensors: dict[str, NDArray]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8).reshape(-1)[0] ^= 1


def _of_another_dtype(tensors: dict[str, NDArray]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].view(np.float16)


def _dropped(tensors: dict[str, NDArray]) -> None:
    del tensors[next(name for name in tensors if "norm" in name.lower())]


@targets
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_first_bit_turned, "it cannot be written (cls_token came back with other bits)"),
        (_of_another_dtype, "it cannot be written (cls_token came back with other bits)"),
        (_dropped, "1 missing"),
    ],
)
def test_what_comes_back_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Target, damage: Callable[..., None], message: str
) -> None:
    parameters = with_room(layouts.BIG_VISION, random_bits(CONFIG, ml_dtypes.bfloat16))
    # Ones in bfloat16 are finite as float16, too.
    parameters["cls_token"] = np.ones_like(parameters["cls_token"])
    source = write(tmp_path / "source", CONFIG, parameters)
    right = conversion._WRITERS[to]

    def damaging(place: Path, tensors: mapping.Tensors, config: ViTConfig) -> None:
        changed = dict(sorted(tensors.items(), key=lambda item: "cls" not in item[0] or "classifier" in item[0]))
        damage(changed)
        right(place, changed, config)

    monkeypatch.setitem(conversion._WRITERS, to, damaging)
    assert message in refusal(source, place(tmp_path, to), to)


@targets
def test_a_full_disk_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, to: Target) -> None:
    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_safetensors", "write_tensors"):
        monkeypatch.setattr(writing, name, full_disk)
    message = refusal(source, place(tmp_path, to), to)
    assert message.startswith(f"{place(tmp_path, to)}: ")
    assert "cannot be written ([Errno 28] No space left on device)" in message
    with pytest.raises(CheckpointError, match="File name too long"):
        convert(source, place(tmp_path / ("y" * 300), to), to)
    # The directories made for it are gone, and one that existed before stays.
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="No space left"):
        convert(source, place(tmp_path / "there" / "not" / "yet", to), to)
    assert list((tmp_path / "there").iterdir()) == []


def test_flaxvit_loads_what_is_converted(tmp_path: Path, filled: Callable[..., VisionTransformer]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'vit-ref[test]'")
    from flax.traverse_util import flatten_dict

    config = replace(CASES["rectangular"].config, image_size=20)
    parameters = pretrained.get_parameters(filled(config))
    convert(write(tmp_path / "hf", config, parameters), tmp_path / "flax", "flax")
    # Leave out its own initialisation, which takes longer than all the rest.
    _, params = transformers.FlaxViTForImageClassification.from_pretrained(tmp_path / "flax", _do_init=False)
    found = flatten_dict(jax.device_get(params), sep="/")
    meant = mapping.export(parameters, config, layouts.FLAX)
    assert bits({name: np.asarray(value) for name, value in found.items()}) == bits(meant)
