"""Are entries of config.json that are no numerics ignored, and is every checkpoint that transformers loads loaded?"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import vit_ref
from vit_ref.cli.commands import main
from vit_ref.errors import CheckpointError, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import Case
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.references.choice import Reference
from vit_ref.verify.references.flax_vit import FlaxViTReference, require_flaxvit
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.weights import checkpoint, mapping, writing
from vit_ref.weights.conversion import convert

CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=3,
    num_hidden_layers=1,
    intermediate_size=7,
    image_size=8,
    patch_size=4,
    num_labels=3,
)
CASE = Case("numerics", CONFIG)
# Each of these stopped a reference, or changed what it returned.
FIELDS: dict[str, Any] = {
    "return_dict": False,
    "torchscript": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "pruned_heads": {"0": [1]},
    "problem_type": "something_else",
    "torch_dtype": "torch.float32",
    "dtype": "no such dtype",
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "no such attention",
    "chunk_size_feed_forward": 1,
    "gradient_checkpointing": True,
    "label2id": ["a"],
    "num_labels": "three",
    "name_or_path": None,
    "use_return_dict": False,
    "to_dict": 1,
}


def traced_by(reference: type[Reference], **fields: Any) -> dict[str, np.ndarray]:
    source = CASE.checkpoint()
    config = ViTConfig.from_hf({**CONFIG.to_hf(), **fields})
    return reference(config, source.tensors).trace(CASE.images(), FLOAT64)


def test_the_references_are_told_numerics_alone() -> None:
    told = ViTConfig.from_hf({**CONFIG.to_hf(), **FIELDS, "id2label": {"0": "a", "1": "b", "2": "c"}}).hf_numerics()
    assert told == CONFIG.hf_numerics()
    numerics = {field.name for field in dataclasses.fields(ViTConfig) if field.compare}
    own = {"pooler", "num_labels", "broadcast_attention_dropout", "pooler_output_size"}
    assert told.keys() == numerics - own | {"id2label", "label2id"}


def test_flaxvit_judges_whatever_else_the_config_holds() -> None:
    require_flaxvit()
    plain, found = traced_by(FlaxViTReference), traced_by(FlaxViTReference, **FIELDS)
    assert plain.keys() == found.keys()
    assert all((plain[site] == found[site]).all() for site in plain)


@pytest.mark.torch
def test_pytorchs_vit_judges_whatever_else_the_config_holds() -> None:
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    from vit_ref.verify.references.torch_vit import TorchViTReference

    plain, found = traced_by(TorchViTReference), traced_by(TorchViTReference, **FIELDS)
    assert plain.keys() == found.keys()
    assert all((plain[site] == found[site]).all() for site in plain)


def test_gelu_python_is_the_erf_form_to_all_who_compute_it(tmp_path: Path) -> None:
    require_flaxvit()
    trace = traced_by(FlaxViTReference)
    spelt = ViTConfig.from_hf({**CONFIG.to_hf(), "hidden_act": "gelu_python"})
    source = CASE.checkpoint()
    for theirs in (
        traced_by(FlaxViTReference, hidden_act="gelu_python"),
        NumpyOracle(spelt, source.tensors).trace(CASE.images()),
    ):
        np.testing.assert_allclose(theirs["logits"], trace["logits"], rtol=0, atol=1e-13)
    # The name is written back unchanged.
    assert spelt.to_hf()["hidden_act"] == "gelu_python"


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({"1": "a", "2": "b", "3": "c"}, ("LABEL_0", "a", "b")),
        ({"0": "a", "2": "c", "7": "x"}, ("a", "LABEL_1", "c")),
        ({"2": "c", "0": "a", "1": "b"}, ("a", "b", "c")),
        ({"-1": "x", "0": "a", "1": "b"}, ("a", "b", "LABEL_2")),
    ],
)
def test_class_ids_with_gaps_are_read_as_transformers_reads_them(
    id2label: dict[str, str], names: tuple[str, ...]
) -> None:
    require_flaxvit()
    import transformers

    content = {**CONFIG.to_hf(), "id2label": id2label}
    config = ViTConfig.from_hf(content)
    assert config.class_names == names and config.to_hf()["id2label"] == id2label
    theirs = transformers.ViTConfig(**content)
    assert config.num_labels == theirs.num_labels
    assert all(theirs.id2label[i] == name for i, name in enumerate(names) if i in theirs.id2label)


def stored_as(path: Path, dtype: str, bits: int, tensors: mapping.Tensors) -> Path:
    """Makes a directory whose safetensors file stores all weights in another dtype. The values do not matter."""
    header, end = {}, 0
    for name, value in tensors.items():
        size = -(-value.size * bits // 8)
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    writing.write_directory(path, {}, CONFIG.to_hf())
    (path / checkpoint.WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end))
    return path


@pytest.mark.parametrize(
    ("dtype", "bits", "kind"),
    [
        ("F8_E4M3", 8, "which is float8"),
        ("F8_E5M2", 8, "which is float8"),
        ("F8_E8M0", 8, "which is float8"),
        ("F8_E4M3FNUZ", 8, "which is float8"),
        ("F6_E2M3", 6, "which is float6"),
        ("F4", 4, "which is float4"),
        ("F128", 128, "which vit_ref does not know"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_dtype_that_numpy_cannot_read_is_named(dtype: str, bits: int, kind: str, lazy: bool, tmp_path: Path) -> None:
    tensors = CASE.checkpoint().tensors
    path = stored_as(tmp_path / "vit", dtype, bits, tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, lazy=lazy)
    assert str(caught.value) == (
        f"{path / checkpoint.WEIGHTS}: {next(iter(tensors))} is stored as {dtype} (and so are"
        f" others: {len(tensors)} of {len(tensors)} tensors), {kind}: save the weights as float32 or bfloat16 with"
        " the library that quantised them, or give the checkpoint from before that"
    )


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "{path}", "--forward-only"],
        ["verify", "{path}", "--stream"],
        ["predict", "{path}", "a.png"],
        ["convert", "{path}", "{path}-out", "--to", "hf"],
    ],
    ids=["verify", "stream", "predict", "convert"],
)
def test_float8_is_one_line_and_no_verdict(command: list[str], tmp_path: Path) -> None:
    path = stored_as(tmp_path / "vit", "F8_E4M3", 8, CASE.checkpoint().tensors)
    ended = CliRunner().invoke(main, [word.format(path=path) for word in command])
    assert ended.exit_code == 2
    (said,) = ended.output.splitlines()
    assert said.startswith(f"vit-ref: {path / checkpoint.WEIGHTS}: ") and "F8_E4M3" in said
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("dtype", "bits", "name"), [("I8", 8, "int8"), ("BOOL", 8, "bool"), ("C64", 64, "complex64")])
def test_a_readable_dtype_that_weights_may_not_have_is_a_fault(
    dtype: str, bits: int, name: str, tmp_path: Path
) -> None:
    path = stored_as(tmp_path / "vit", dtype, bits, CASE.checkpoint().tensors)
    with pytest.raises(MappingError) as caught:
        vit_ref.from_pretrained(path)
    assert caught.value.path == path
    assert {fault.kind for fault in caught.value.faults} == {"unusable dtype"}
    assert f"classifier.bias: it is {name}: convert the weights to float64, float32, float16 or bfloat16" in str(
        caught.value
    )


def test_every_fault_is_said_with_the_checkpoints_path(tmp_path: Path) -> None:
    """Covers every finder of a fault: the loader, and the check of a model or candidate, block by block or whole."""
    from vit_ref.verify.proposals.proposal import propose
    from vit_ref.verify.session import check_port
    from vit_ref.verify.stream import check_streamed

    source = CASE.checkpoint()
    tensors = {**source.tensors, "classifier.bias": np.full(3, np.nan, "f4")}
    writing.write_directory(tmp_path, tensors, CONFIG.to_hf())
    for ask in (
        vit_ref.from_pretrained,
        lambda path: check_port(None, path),
        lambda path: check_port(lambda pixels: pixels, path),
        check_streamed,
        lambda path: propose(lambda pixels: pixels, path),
        lambda path: convert(path, tmp_path / "out", "hf"),
    ):
        with pytest.raises(MappingError) as caught:
            ask(tmp_path)
        assert str(caught.value).splitlines() == [
            f"{tmp_path}: the weights do not fit the configuration (layout hf): 1 not finite",
            "  not finite: classifier.bias: it has nan at (0,)",
        ]


def test_a_saved_config_does_not_mention_quantised_tensors(tmp_path: Path) -> None:
    source = CASE.checkpoint()
    writing.write_directory(tmp_path / "given", source.tensors, {**(source.config or {}), **FIELDS})
    vit_ref.save_pretrained(vit_ref.from_pretrained(tmp_path / "given"), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"quantization_config", "pruned_heads"} & saved.keys()
    # All other entries are kept.
    assert saved["return_dict"] is False
