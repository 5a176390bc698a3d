"""Are checkpoint files read whole or refused in one clear line, and written whole or not at all?"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import save_file

import vit_ref
from tests.helpers.vit_strategies import random_bits, with_room
from vit_ref.errors import CheckpointError, ConfigError, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import Case
from vit_ref.weights import checkpoint, layouts, mapping, pretrained, tensor_files, writing
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.stored_dtypes import READABLE
from vit_ref.weights.tensor_files import LazyTensors

LABELS = ("cat", "dog", "dog")  # ImageNet too has one name twice
PREPROCESSOR = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.4, 0.5, 0.6], "resample": 3}
CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=7,
    image_size=8,
    patch_size=4,
    num_labels=3,
    labels=LABELS,
    extra={"encoder_stride": 8, "custom_note": "kept"},
    preprocessor=PREPROCESSOR,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    source = Case("directory", CONFIG).checkpoint()
    writing.write_directory(tmp_path / "vit", source.tensors, CONFIG.to_hf(), PREPROCESSOR)
    return tmp_path / "vit"


def refusal(path: Path | str, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        vit_ref.from_pretrained(path)
    return str(caught.value)


def refusal_when_opened(path: Path) -> str:
    """Returns the error for a damaged file, which has to be the same if no tensor is read."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, lazy=True)
    assert str(caught.value) == refusal(path)
    return str(caught.value)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        value.dtype == b.tensors[name].dtype and value.tobytes() == b.tensors[name].tobytes()
        for name, value in a.tensors.items()
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", ["5GB", 900])
def test_a_round_trip_keeps_every_byte_and_everything_else(tmp_path: Path, dtype: type, shards: int | str) -> None:
    source = Case("source", CONFIG, stored=dtype).checkpoint()
    writing.write_directory(tmp_path / "a", source.tensors, CONFIG.to_hf(), PREPROCESSOR, max_shard_size=shards)
    assert (tmp_path / "a" / checkpoint.INDEX).exists() == (shards == 900)
    vit_ref.save_pretrained(vit_ref.from_pretrained(tmp_path / "a"), tmp_path / "b", max_shard_size=shards)
    before, after = checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "b")
    assert same(before, after) and same(source, after)
    one_by_one = checkpoint.read(tmp_path / "a", lazy=True)
    assert isinstance(one_by_one.tensors, LazyTensors) and same(source, one_by_one)
    assert all(one_by_one.tensors.shape(name) == value.shape for name, value in source.tensors.items())
    assert after.preprocessor == PREPROCESSOR
    assert after.config is not None and before.config is not None
    assert {key: after.config[key] for key in before.config} == before.config
    assert after.config["id2label"] == {"0": "cat", "1": "dog", "2": "dog"}
    assert after.config["custom_note"] == "kept"
    model = vit_ref.from_pretrained(tmp_path / "b")
    assert model.config == CONFIG and model.config.labels == LABELS


def test_flax_msgpack_is_read(directory: Path) -> None:
    model = vit_ref.from_pretrained(directory)
    tree = traverse_util.unflatten_dict(
        {
            tuple(name.split("/")): value
            for name, value in mapping.export(pretrained.get_parameters(model), CONFIG, layouts.FLAX).items()
        }
    )
    (directory / checkpoint.WEIGHTS).unlink()
    (directory / checkpoint.FLAX_WEIGHTS).write_bytes(serialization.to_bytes(tree))
    again = pretrained.get_parameters(vit_ref.from_pretrained(directory))
    assert all((again[path] == value).all() for path, value in pretrained.get_parameters(model).items())


google_layouts = pytest.mark.parametrize("layout", [layouts.NPZ, layouts.BIG_VISION], ids=lambda layout: layout.name)


def google_npz(path: Path, layout: layouts.Layout, config: ViTConfig = CONFIG, **extra: np.ndarray) -> mapping.Tensors:
    """Writes an `.npz` in one of google-research's layouts, and returns the parameters in it."""
    source = Case("npz", config).checkpoint()
    parameters = with_room(layout, mapping.port(source.tensors, config, layouts.HF))
    np.savez(path, **mapping.export(parameters, config, layout), **extra)
    return parameters


@google_layouts
def test_npz_is_read_with_the_numerics_of_its_own_code(tmp_path: Path, layout: layouts.Layout) -> None:
    parameters = google_npz(tmp_path / "ViT.npz", layout)
    model = vit_ref.from_pretrained(tmp_path / "ViT.npz")
    expected = {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "labels": ()}
    assert model.config == ViTConfig(**{**CONFIG.__dict__, **expected})
    found = pretrained.get_parameters(model)
    assert all((found[path] == value).all() for path, value in parameters.items())


@google_layouts
def test_npz_with_pre_logits_and_no_head_has_a_pooler(tmp_path: Path, layout: layouts.Layout) -> None:
    config = ViTConfig(**{**CONFIG.__dict__, "num_labels": 0, "labels": (), "pooler": True, "pooler_output_size": 5})
    google_npz(tmp_path / "ViT.npz", layout, config)
    model = vit_ref.from_pretrained(tmp_path / "ViT.npz")
    assert model.config.pooler and model.config.pooler_width == 5


@google_layouts
@pytest.mark.parametrize(
    ("extra", "pooling"),
    [({}, "the mean of the patches, 'gap'"), ({"MAPHead_0/probe": 1.0}, "attention, pool_type 'map'")],
)
def test_npz_without_a_cls_token_pools_in_another_way(
    tmp_path: Path, layout: layouts.Layout, extra: dict, pooling: str
) -> None:
    tensors = mapping.export(with_room(layout, random_bits(CONFIG, np.float32)), CONFIG, layout)
    del tensors["cls"]
    np.savez(tmp_path / "ViT.npz", **tensors, **extra)
    assert refusal(tmp_path / "ViT.npz") == (
        f"{tmp_path / 'ViT.npz'}: it has no cls token, so it pools by {pooling}: give a checkpoint with pool_type 'tok'"
    )


def test_a_deit_without_distillation_is_a_vit(tmp_path: Path) -> None:
    """Reads a configuration like that of facebook/deit-base-patch16-224: a ViT's model type, DeiT's preprocessing."""
    # transformers' convert_vit_timm_to_pytorch.py made it. It writes only the values that deviate from B/16.
    config = {**CONFIG.to_hf(), "model_type": "vit", "architectures": ["ViTForImageClassification"]}
    preprocessor = {"feature_extractor_type": "DeiTFeatureExtractor", "do_center_crop": True, "crop_size": 8, "size": 9}
    source = Case("deit", CONFIG).checkpoint()
    writing.write_directory(tmp_path, source.tensors, config, preprocessor)
    model = vit_ref.from_pretrained(tmp_path)
    assert model.config == CONFIG and model.config.preprocessor == preprocessor
    # With a distillation token it is another model under either model type.
    token = {"vit.embeddings.distillation_token": np.zeros((1, 1, 6), np.float32)}
    writing.write_directory(tmp_path, {**source.tensors, **token}, config, preprocessor)
    assert "unexpected: vit.embeddings.distillation_token: " in refusal(tmp_path, MappingError)


@pytest.mark.parametrize("architectures", [["ViTModel"], None])
@pytest.mark.parametrize("pooler", [True, False])
def test_a_headless_checkpoint_makes_a_headless_model(tmp_path: Path, architectures: list | None, pooler: bool) -> None:
    config = ViTConfig(**{**CONFIG.__dict__, "num_labels": 0, "labels": (), "pooler": pooler})
    source = Case("headless", config).checkpoint()
    writing.write_directory(tmp_path, source.tensors, {**config.to_hf(), "architectures": architectures})
    model = vit_ref.from_pretrained(tmp_path)
    assert (model.config.num_labels, model.config.pooler) == (0, pooler)
    vit_ref.save_pretrained(model, tmp_path / "again")
    assert same(source, checkpoint.read(tmp_path / "again"))


def aligned(value: np.ndarray) -> np.ndarray:
    """Returns a copy that begins at a multiple of 64 bytes, where jax uses NumPy's memory as its own."""
    memory = np.empty(value.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


def test_a_model_does_not_share_memory_with_its_source() -> None:
    ported = mapping.port(Case("alias", CONFIG).checkpoint().tensors, CONFIG, layouts.HF)
    # Chance decides where an array begins. Memory-mapped files and large arrays begin at such addresses.
    parameters = {path: aligned(value) for path, value in ported.items()}
    model = pretrained.build(CONFIG, parameters)
    for value in parameters.values():
        value[...] = 0
    found = pretrained.get_parameters(model)
    assert {path for path in ported if not (found[path] == ported[path]).all()} == set()


def test_float64_weights_are_not_silently_truncated(tmp_path: Path) -> None:
    source = Case("double", CONFIG, stored=np.float64).checkpoint()
    writing.write_directory(tmp_path, source.tensors, CONFIG.to_hf())
    assert "float64, which jax would truncate: set jax_enable_x64" in refusal(tmp_path)


def test_no_such_directory() -> None:
    what = "no such directory or file: correct the path, or give the hub id OWNER/NAME"
    assert refusal("./nowhere/at/all") == f"./nowhere/at/all: {what}"


def test_an_empty_name() -> None:
    assert refusal("") == "the checkpoint's name is empty: give a directory or a hub id"


def test_a_hub_id_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert refusal("someone/no-such-vit") == (
        "someone/no-such-vit: no such directory exists. As a hub id it is not in the cache, and the hub cannot be"
        " reached:"
        " give a directory, or go online"
    )


def test_a_hub_id_from_the_cache_while_offline(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    directory.rename(repository / "snapshots" / "0123abc")
    assert vit_ref.from_pretrained("someone/vit").config == CONFIG


@pytest.mark.parametrize("package", ["requests", "httpx"])
def test_a_hub_id_from_the_cache_without_a_network(
    package: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers both ways in which releases of huggingface_hub use the network."""
    kind: Any = type("ConnectError", (OSError if package == "requests" else Exception,), {"__module__": package})
    asked = []

    def unreachable(name: str, revision: None) -> None:
        raise kind("no route to host")

    def cached(name: str, *, revision: None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert vit_ref.from_pretrained("someone/vit").config == CONFIG
    assert {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.SHARDS} <= set(asked)


def test_a_hub_repository_of_pickles_is_refused_before_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: ["config.json", "pytorch_model.bin"])
    assert refusal("someone/vit") == (
        "someone/vit/pytorch_model.bin: it is a pickle, which can run code when read: convert it to safetensors first"
    )


def test_a_hub_repository_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["README.md", "model.onnx"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: files)
    assert refusal("someone/vit") == (
        "someone/vit: it has no weights: give a repository with model.safetensors, model.safetensors.index.json or"
        " flax_model.msgpack"
    )


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["model.safetensors", "flax_model.msgpack", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.safetensors.index.json", "x.bin"], ["model.safetensors.index.json", "model-*-of-*.safetensors"]),
        (["flax_model.msgpack", "pytorch_model.bin"], ["flax_model.msgpack"]),
    ],
)
def test_one_format_is_fetched_from_the_hub(
    files: list[str], fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, revision: None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        raise OSError("stop here")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert refusal("someone/vit").endswith("As a hub id it was refused: stop here: correct the name, or log in")
    assert asked == ["config.json", "preprocessor_config.json", *fetched]


@pytest.mark.hub
@pytest.mark.skipif("VIT_REF_HUB" not in os.environ, reason="needs the Hugging Face hub: set VIT_REF_HUB=1 to run it")
def test_a_hub_id_online() -> None:
    assert vit_ref.from_pretrained("google/vit-base-patch16-224").config.num_labels == 1000


def test_no_config(directory: Path) -> None:
    (directory / checkpoint.CONFIG).unlink()
    assert refusal(directory) == f"{directory}: it has no config.json: fetch the whole checkpoint again"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object(directory: Path, content: str) -> None:
    (directory / checkpoint.CONFIG).write_text(content)
    said = refusal(directory).removeprefix(f"{directory / 'config.json'}: ")
    assert said.startswith(("it cannot be read as JSON (", "it is not a JSON object"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "swin", "model_type is 'swin': give a checkpoint whose model_type is 'vit'"),
        ("model_type", "deit", "model_type is 'deit', which has a second class token for distillation, and this "),
        ("hidden_act", "mish", "hidden_act is 'mish': give one of gelu, gelu_new, "),
        ("num_attention_heads", 4, "hidden_size 6 is not a multiple of num_attention_heads 4"),
        ("image_size", 10, "image height 10 is not a multiple of the patch height 4"),
        ("image_size", [8, 9], "image width 9 is not a multiple of the patch width 4"),
        ("layer_norm_eps", 0, "layer_norm_eps is 0: give a positive number"),
        ("layer_norm_eps", float("inf"), "layer_norm_eps is inf: give a positive number"),
        ("hidden_dropout_prob", 1.0, "hidden_dropout_prob is 1.0: give a probability"),
        ("num_hidden_layers", "2", "num_hidden_layers is '2': give an integer of at least 1"),
        ("num_hidden_layers", 10**6, "num_hidden_layers is 1000000: give an integer of at least 1 and at most 1024"),
        ("hidden_size", 2**40, "hidden_size is 1099511627776: give an integer of at least 1 and at most 1048576"),
        ("image_size", 2**40, "image_size is 1099511627776: give a positive integer of at most 1048576, or "),
        ("qkv_bias", "yes", "qkv_bias is 'yes': give true or false"),
        ("architectures", "ViTModel", "architectures is 'ViTModel': give a list of class names"),
        ("id2label", ["a", "b"], "id2label is not a mapping from class ids to names ("),
        ("id2label", {"cat": 0}, "id2label is not a mapping from class ids to names ("),
    ],
)
def test_a_config_that_cannot_be_honoured(directory: Path, field: str, value: object, message: str) -> None:
    config = json.loads((directory / checkpoint.CONFIG).read_text())
    (directory / checkpoint.CONFIG).write_text(json.dumps({**config, field: value}))
    assert refusal(directory, ConfigError).startswith(f"{directory / checkpoint.CONFIG}: {message}")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("layer_norm_eps", "layer_norm_eps is inf: give a positive number"),
        ("initializer_range", "initializer_range is inf: give a positive number"),
        ("hidden_size", "hidden_size is inf: give an integer of at least 1"),
    ],
)
def test_an_integer_without_end_is_refused_by_who_uses_it(directory: Path, field: str, message: str) -> None:
    config = json.loads((directory / checkpoint.CONFIG).read_text())
    (directory / checkpoint.CONFIG).write_text(json.dumps({**config, field: 10**400}))
    assert refusal(directory, ConfigError).startswith(f"{directory / checkpoint.CONFIG}: {message}")
    # transformers writes this for "no limit".
    (directory / checkpoint.CONFIG).write_text(json.dumps({**config, "model_max_length": int(1e30)}))
    assert vit_ref.from_pretrained(directory).config.extra["model_max_length"] == 1e30


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.PREPROCESSOR])
def test_json_that_is_nested_without_end(directory: Path, name: str) -> None:
    (directory / name).write_text("[" * 100_000)
    assert refusal(directory).startswith(f"{directory / name}: it cannot be read as JSON (maximum recursion depth")


def test_unopenable_weights_are_not_called_missing_or_damaged(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = directory / checkpoint.WEIGHTS

    def forbidden(*arguments: object, **options: object) -> None:
        raise FileNotFoundError  # safetensors raises this for any file that it cannot open

    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "load_file", forbidden)
        patched.setattr(tensor_files.safetensors, "safe_open", forbidden)
        assert refusal_when_opened(directory) == f"{weights}: this user may not read it: change its permissions"
    weights.unlink()
    weights.symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it is a link to no file: fetch it again$"):
        tensor_files.read_tensors(weights)
    weights.unlink()
    weights.mkdir()
    message = f"{weights}: it is a directory in place of a file of weights: fetch the file again"
    assert refusal_when_opened(directory) == message


@pytest.mark.parametrize("keep", [0, 7, 100, -100])
def test_truncated_safetensors(directory: Path, keep: int) -> None:
    whole = (directory / checkpoint.WEIGHTS).read_bytes()
    (directory / checkpoint.WEIGHTS).write_bytes(whole[:keep])
    damage = f"{directory / 'model.safetensors'}: it is damaged or truncated ("
    assert refusal_when_opened(directory).startswith(damage)


def test_corrupt_safetensors_header(directory: Path) -> None:
    whole = bytearray((directory / checkpoint.WEIGHTS).read_bytes())
    whole[8:20] = b"\xff" * 12
    (directory / checkpoint.WEIGHTS).write_bytes(whole)
    assert "model.safetensors: it is damaged or truncated" in refusal_when_opened(directory)


def test_tensors_read_one_by_one_are_those_in_the_file_now(directory: Path) -> None:
    tensors = checkpoint.read(directory, lazy=True).tensors
    name = "vit.layernorm.bias"
    before = tensors[name]
    assert tensors[name] is not before and tensors[name].tobytes() == before.tobytes()
    (directory / checkpoint.WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors: it is damaged or truncated"):
        tensors[name]
    (directory / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file"):
        tensors[name]


@pytest.mark.parametrize("layout", [".npz", ".msgpack"])
def test_files_that_cannot_be_read_one_by_one_are_read_whole(tmp_path: Path, layout: str) -> None:
    tensors = {"a/b": np.arange(3.0), "c": np.ones((2, 1), np.float32)}
    writing.write_tensors(tmp_path / f"some{layout}", tensors)
    found = checkpoint.read(tmp_path / f"some{layout}", lazy=True)
    assert not isinstance(found.tensors, LazyTensors) and same(found, Checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("content", [b"", b"\xc1garbage", b"\x93\x01\x02\x03", b"\x81\xa1a\x01"])
def test_damaged_msgpack(directory: Path, content: bytes) -> None:
    (directory / checkpoint.WEIGHTS).unlink()
    (directory / checkpoint.FLAX_WEIGHTS).write_bytes(content)
    assert "flax_model.msgpack: it is damaged or truncated" in refusal(directory)


def test_damaged_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "cut.npz", cls=np.zeros((1, 1, 6)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    assert "cut.npz: it is damaged or truncated" in refusal(tmp_path / "cut.npz")


def test_npz_with_a_member_that_is_no_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", cls=np.zeros((1, 1, 6)))
    with zipfile.ZipFile(tmp_path / "odd.npz", "a") as archive:
        archive.writestr("note.txt", "hello")
    message = "odd.npz: it is damaged or truncated (note.txt is not an array): fetch it again"
    assert message in refusal(tmp_path / "odd.npz")


@pytest.mark.parametrize(
    ("descr", "shape", "said"),
    [
        ("<f4", "(1000000000000000,)", "it does not fit in memory, or is damaged (Unable to allocate 3.55 PiB"),
        ("(f4", "(1,)", "it is damaged or truncated ("),
    ],
)
def test_npz_whose_header_cannot_be(tmp_path: Path, descr: str, shape: str, said: str) -> None:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("cls.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert refusal(tmp_path / "odd.npz").startswith(f"{tmp_path / 'odd.npz'}: {said}")


def test_npz_that_is_no_vit(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", cls=np.zeros((1, 1, 6)))
    assert "other.npz: it is not an .npz of google-research/vision_transformer" in refusal(tmp_path / "other.npz")


def test_npz_of_a_rectangle_does_not_say_which(tmp_path: Path) -> None:
    config = replace(CONFIG, image_size=(8, 12))
    tensors = mapping.port(Case("rectangle", config).checkpoint().tensors, config, layouts.HF)
    np.savez(tmp_path / "wide.npz", **mapping.export(tensors, config, layouts.NPZ))
    assert refusal(tmp_path / "wide.npz").endswith("wide.npz: its 6 positions are no square grid: give config=")
    assert vit_ref.from_pretrained(tmp_path / "wide.npz", config=config).config == config


class Bomb:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_never_run(directory: Path, tmp_path: Path) -> None:
    (directory / checkpoint.WEIGHTS).unlink()
    pickled = pickle.dumps(Bomb(tmp_path / "exploded"))
    (directory / "pytorch_model.bin").write_bytes(pickled)
    message = "pytorch_model.bin: it is a pickle, which can run code when read: convert it to safetensors first"
    assert refusal(directory).endswith(message)
    assert refusal(directory / "pytorch_model.bin").endswith(message)
    np.savez(tmp_path / "bomb.npz", cls=np.array([Bomb(tmp_path / "exploded")], dtype=object))
    assert "bomb.npz: it is damaged" in refusal(tmp_path / "bomb.npz")
    assert not (tmp_path / "exploded").exists()


def test_no_weights_at_all(directory: Path) -> None:
    (directory / checkpoint.WEIGHTS).unlink()
    message = "it has no weights: give a directory with model.safetensors, model.safetensors.index.json or flax_model"
    assert message in refusal(directory)


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"x")
    assert refusal(tmp_path / "weights.onnx").endswith(
        "weights.onnx: it is no known kind of file: give one of .safetensors, .msgpack, .npz"
    )


def test_a_lone_file_reads_the_config_beside_it_or_asks_for_one(directory: Path, tmp_path: Path) -> None:
    assert vit_ref.from_pretrained(directory / checkpoint.WEIGHTS).config == CONFIG
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((directory / checkpoint.WEIGHTS).read_bytes())
    assert refusal(lone) == f"{lone}: it has no configuration beside it: give its directory, or config="
    assert vit_ref.from_pretrained(lone, config=CONFIG).config == CONFIG


def test_missing_extra_misshapen_and_nan_tensors_are_all_listed(directory: Path) -> None:
    tensors = checkpoint.read(directory).tensors
    del tensors["vit.layernorm.bias"], tensors["classifier.weight"]
    tensors["vit.pooler.dense.bias"] = np.zeros(6, np.float32)
    tensors["vit.embeddings.cls_token"] = np.zeros((1, 6), np.float32)
    tensors["vit.layernorm.weight"][4] = -np.inf
    save_file(tensors, directory / checkpoint.WEIGHTS)
    text = refusal(directory, MappingError)
    assert text.splitlines()[0].endswith("(layout hf): 1 misshapen, 2 missing, 1 unexpected, 1 not finite")
    for line in (
        "missing: vit.layernorm.bias: it should have shape (6,) for norm.bias",
        "missing: classifier.weight: it should have shape (3, 6) for head.kernel",
        "unexpected: vit.pooler.dense.bias: it has shape (6,), and no rule takes it: it belongs to a pooler, and a"
        " classifier's"
        " head reads the cls token without one",
        "misshapen: vit.embeddings.cls_token: it should have shape (1, 1, 6) for cls_token, and has (1, 6)",
        "not finite: vit.layernorm.weight: it has -inf at (4,)",
    ):
        assert f"  {line}" in text.splitlines()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("weight_map"), "it has no weight_map from tensors to files"),
        (lambda index: index["weight_map"].update(x="model-00001-of-00004.safetensors"), "the index and the file disa"),
        (lambda index: index["weight_map"].update(x="absent.safetensors"), "absent.safetensors: no such file"),
        (lambda index: index["weight_map"].update(x="../out.safetensors"), "is not the name of a file beside"),
    ],
)
def test_a_sharded_checkpoint_whose_index_is_wrong(tmp_path: Path, edit, message: str) -> None:
    tensors = Case("shards", CONFIG).checkpoint().tensors
    writing.write_directory(tmp_path, tensors, CONFIG.to_hf(), max_shard_size=900)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads(
        (tmp_path / checkpoint.INDEX).read_text().replace(shards[0].name, "model-00001-of-00004.safetensors")
    )
    shards[0].rename(tmp_path / "model-00001-of-00004.safetensors")
    edit(index)
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    assert re.search(re.escape(message), refusal_when_opened(tmp_path))


def test_safetensors_have_the_bytes_of_their_own_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = ["?", "i1", "u1", "i2", "u2", "f2", "i4", "u4", "f4", "i8", "u8", "f8", "c8"]
    kinds = [*map(np.dtype, codes), np.dtype(ml_dtypes.bfloat16)]
    tensors = {f"é.{n}.{kind}": rng.normal(size=(n, 3)).astype(kind) for n in (2, 11, 1) for kind in kinds}
    tensors["scalar"] = np.full((), 3, np.float32)
    tensors["turned"] = np.asfortranarray(tensors["é.11.float32"])
    writing.write_safetensors(tmp_path / "ours", tensors)
    # It writes memory in its own byte order.
    save_file({**tensors, "turned": tensors["é.11.float32"]}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    content = (tmp_path / "ours").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == READABLE


def test_a_failed_save_leaves_what_was_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit_ref.from_pretrained(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_safetensors", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        vit_ref.save_pretrained(model, directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize("size", ["abc", "1 parsec", "0KB", "-1KB", " -1KB", 0, -1, 1.5, None, True])
def test_a_shard_size_that_is_none(directory: Path, size: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^max_shard_size is {size!r}: (?!max_shard)"):
        vit_ref.save_pretrained(vit_ref.from_pretrained(directory), directory, max_shard_size=size)


@google_layouts
def test_npz_with_pre_logits_and_head_asks_which_to_leave_out(tmp_path: Path, layout: layouts.Layout) -> None:
    extra = {"pre_logits/kernel": np.ones((6, 6), "f4"), "pre_logits/bias": np.ones(6, "f4")}
    google_npz(tmp_path / "ViT.npz", layout, **extra)
    assert "leave one out with ignore=['head/*'] or ignore=['pre_logits/*']" in refusal(tmp_path / "ViT.npz")
    assert vit_ref.from_pretrained(tmp_path / "ViT.npz", ignore=["head/*"]).config.pooler
    assert vit_ref.from_pretrained(tmp_path / "ViT.npz", ignore=["pre_logits/*"]).config.num_labels == 3


def test_npz_of_bfloat16(tmp_path: Path) -> None:
    parameters = mapping.port(Case("npz", CONFIG, stored=ml_dtypes.bfloat16).checkpoint().tensors, CONFIG, layouts.HF)
    np.savez(tmp_path / "ViT.npz", **mapping.export(parameters, CONFIG, layouts.NPZ))
    found = pretrained.get_parameters(vit_ref.from_pretrained(tmp_path / "ViT.npz"))
    assert all(found[path].tobytes() == value.tobytes() for path, value in parameters.items())


def test_another_configuration_keeps_the_other_json_fields(directory: Path, tmp_path: Path) -> None:
    other = ViTConfig(**{**CONFIG.__dict__, "layer_norm_eps": 1e-3, "extra": {}, "preprocessor": None})
    model = vit_ref.from_pretrained(directory, config=other)
    assert model.config.layer_norm_eps == 1e-3
    assert model.config.preprocessor == PREPROCESSOR and model.config.extra["custom_note"] == "kept"


def test_a_save_where_a_file_stands(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="taken: it cannot be written"):
        vit_ref.save_pretrained(vit_ref.from_pretrained(directory), tmp_path / "taken")


def test_saving_over_another_sharding_leaves_no_stale_weights(directory: Path) -> None:
    model = vit_ref.from_pretrained(directory)
    for shards in (900, "5GB", 900):
        vit_ref.save_pretrained(model, directory, max_shard_size=shards)
        assert (directory / checkpoint.WEIGHTS).exists() == (shards == "5GB")
        assert (directory / checkpoint.INDEX).exists() == (shards == 900)
        assert vit_ref.from_pretrained(directory).config == CONFIG


def test_saving_without_preprocessing_warns_of_an_old_file(directory: Path) -> None:
    model = vit_ref.from_pretrained(directory)
    assert model.config.preprocessor == PREPROCESSOR
    vit_ref.save_pretrained(model, directory)
    model.config = replace(model.config, preprocessor=None)
    with pytest.warns(
        UserWarning, match=r"preprocessor_config\.json: the model has no preprocessing of its own, so this file stays"
    ):
        vit_ref.save_pretrained(model, directory)
    assert vit_ref.from_pretrained(directory).config.preprocessor == PREPROCESSOR


def test_a_shard_size_may_be_numpys(directory: Path) -> None:
    vit_ref.save_pretrained(vit_ref.from_pretrained(directory), directory, max_shard_size=np.int64(900))
    assert (directory / checkpoint.INDEX).exists()


def test_a_changed_head_does_not_keep_the_old_names() -> None:
    config = ViTConfig.from_hf(CONFIG.to_hf())
    assert config.labels == LABELS
    fresh = ViTConfig(**{**config.__dict__, "num_labels": 2, "labels": ()}).to_hf()
    assert fresh["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"} and fresh["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
    named = ViTConfig(**{**config.__dict__, "num_labels": 2, "labels": ("x", "y")}).to_hf()
    assert named["label2id"] == {"x": 0, "y": 1}
    headless = ViTConfig(**{**config.__dict__, "num_labels": 0, "labels": ()}).to_hf()
    assert headless["id2label"] == CONFIG.to_hf()["id2label"] and headless["architectures"] == ["ViTModel"]


def test_what_changes_no_numerics_changes_no_equality() -> None:
    plain = ViTConfig(**{**CONFIG.__dict__, "labels": (), "extra": {}, "preprocessor": None})
    assert plain == CONFIG and hash(plain) == hash(CONFIG)
    assert ViTConfig(**{**CONFIG.__dict__, "layer_norm_eps": 1e-6}) != CONFIG
