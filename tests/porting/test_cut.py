"""Is a cut of a checkpoint the same model with fewer blocks and positions, in the same layout?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import vit_ref
from vit_ref.errors import CheckpointError, MappingError
from vit_ref.verify.cases import CASES, Case
from vit_ref.weights import layouts, mapping
from vit_ref.weights.checkpoint import INDEX, WEIGHTS, read
from vit_ref.weights.conversion import convert
from vit_ref.weights.cut import open_cut
from vit_ref.weights.pretrained import get_parameters, open_checkpoint
from vit_ref.weights.tensor_files import LazyTensors
from vit_ref.weights.writing import write_directory

pytestmark = pytest.mark.porting

# Layouts without a configuration assume these.
CONFIG = dataclasses.replace(
    CASES["deep"].config,
    image_size=30,
    num_channels=3,
    num_hidden_layers=12,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CASE = Case("to-cut", CONFIG, seed=21)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of twelve blocks with a grid of six by six, whose cls token has no position."""
    source = CASE.checkpoint()
    name = "vit.embeddings.position_embeddings"
    positions = source.tensors[name].copy()
    positions[:, 0] = 0
    directory = tmp_path_factory.mktemp("whole") / "given"
    write_directory(directory, {**source.tensors, name: positions}, source.config or {}, {"size": 30})
    return directory


def in_layout(layout: str, whole: Path, tmp_path: Path) -> Path:
    """Returns the checkpoint in a layout."""
    if layout == "hf":
        return whole
    if layout == "hf5":
        model = vit_ref.from_pretrained(whole)
        tensors = mapping.export(get_parameters(model), model.config, layouts.HF5)
        write_directory(tmp_path / "hf5", tensors, model.config.to_hf())
        return tmp_path / "hf5"
    one_file = layout in ("npz", "big_vision")
    place = tmp_path / ("given.npz" if one_file else layout)
    convert(whole, place, layout)
    return place


@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_a_cut_is_read_back_as_the_first_and_the_last_block(layout: str, whole: Path, tmp_path: Path) -> None:
    given = in_layout(layout, whole, tmp_path)
    full = get_parameters(vit_ref.from_pretrained(given))
    source, config = open_checkpoint(given, lazy=True)
    with open_cut(source, config) as cut:
        assert cut.source.path.name == given.name and cut.source.path.is_dir() == given.is_dir()
        opened = read(cut.source.path)
        assert mapping.detect(opened.tensors).name == layout
        assert opened.tensors.keys() == cut.source.tensors.keys()
        assert all(np.array_equal(opened.tensors[name], cut.source.tensors[name]) for name in opened.tensors)
        assert [file.name for file in opened.files] == [file.name for file in source.files]
        assert (opened.config, opened.preprocessor) == (cut.source.config, source.preprocessor)
        model = vit_ref.from_pretrained(cut.source.path)
        assert model.config == cut.config
        assert (model.config.num_hidden_layers, model.config.image_hw, cut.blocks) == (2, (20, 20), (0, 11))
        found = get_parameters(model)
        parts = cut.source.path.parent
    assert not parts.exists()
    for path, value in found.items():
        if path == "position_embeddings":
            expected = full[path][:, [0, *(1 + 6 * row + column for row in range(4) for column in range(4))]]
        else:
            expected = full[path.replace("blocks.1.", "blocks.11.")]
        assert value.dtype == expected.dtype and np.array_equal(value, expected), path
    assert (cut.tensors, cut.of) == (len(cut.source.tensors), len(source.tensors))


def test_a_cut_reads_no_value_of_a_middle_block(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    get = LazyTensors.__getitem__
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: asked.append(name) or get(self, name))
    source, config = open_checkpoint(whole, lazy=True)
    with open_cut(source, config) as cut:
        assert len(asked) == len(set(asked)) == cut.tensors == 8 + 2 * 16
        assert not [name for name in asked if "encoder.layer." in name and not name.startswith(BLOCKS)]


BLOCKS = ("vit.encoder.layer.0.", "vit.encoder.layer.11.")


def test_shards_prefixes_and_other_tensors_stay(whole: Path, tmp_path: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in read(whole).tensors.items()}
    tensors["module.vit.encoder.layer.11.extra"] = np.arange(3)
    tensors["module.vit.encoder.layer.7.extra"] = np.arange(3)
    tensors["module.extra"] = np.zeros(3, bool)
    write_directory(tmp_path / "shards", tensors, read(whole).config, max_shard_size=40_000)
    source, config = open_checkpoint(tmp_path / "shards", lazy=True)
    with open_cut(source, config) as cut:
        files = {file.name for file in cut.source.path.iterdir()}
        assert files == {"config.json", INDEX, *(file.name for file in cut.source.files)}
        assert len(files) > 4 and WEIGHTS not in files
        stored = LazyTensors(*cut.source.files)
        assert all(name.startswith("module.") for name in stored)
        assert {name for name in stored if "extra" in name} == {"module.extra", "module.vit.encoder.layer.1.extra"}
        assert read(cut.source.path).tensors.keys() == cut.source.tensors.keys()


def test_a_lone_file_keeps_the_configuration_beside_it(whole: Path) -> None:
    source, config = open_checkpoint(whole / WEIGHTS, lazy=True)
    with open_cut(source, config) as cut:
        assert cut.source.path.name == WEIGHTS
        assert vit_ref.from_pretrained(cut.source.path).config == cut.config


@pytest.mark.parametrize(
    ("sides", "grid"), [((30, 60), (2, 8)), ((60, 30), (8, 2)), ((10, 60), (2, 8)), ((30, 35), None)]
)
def test_a_rectangle_stays_one(sides: tuple[int, int], grid: tuple[int, int] | None, tmp_path: Path) -> None:
    case = dataclasses.replace(CASE, config=dataclasses.replace(CONFIG, image_size=sides))
    source = case.write(tmp_path / "given")
    with open_cut(source, case.config) as cut:
        assert cut.config.grid() == (grid or (6, 7))
        assert vit_ref.from_pretrained(cut.source.path).config == cut.config
        pixels = np.arange(np.prod(sides)).reshape(1, *sides, 1)
        assert cut.crop(pixels).shape[1:3] == cut.config.image_hw


def test_a_cut_names_what_it_leaves_out(whole: Path) -> None:
    source, config = open_checkpoint(whole, lazy=True)
    with open_cut(source, config) as cut:
        assert cut.note == (
            "quick: this is a verdict on a cut of the checkpoint, and none on the whole: blocks 0 and 11 of 12, here"
            " blocks 0 and 1; a grid of 4 x 4 of 6 x 6 patches; images of 20 x 20 of 30 x 30 pixels; 40 of 200 tensors."
            " Nothing else was verified: run it without quick for the full verdict"
        )


def test_a_checkpoint_that_is_small_already_is_refused(tmp_path: Path) -> None:
    case = CASES["stored-float64"]
    source = case.write(tmp_path / "tiny")
    with (
        pytest.raises(
            CheckpointError, match="num_hidden_layers is 1 and the grid is 2 x 8 patches, so there is nothing to cut"
        ),
        open_cut(source, case.config),
    ):
        pass


def test_a_tensor_that_is_missing_anywhere_is_named(whole: Path, tmp_path: Path) -> None:
    opened = read(whole)
    gone = "vit.encoder.layer.7.layernorm_before.weight"
    tensors = {name: tensor for name, tensor in opened.tensors.items() if name != gone}
    write_directory(tmp_path / "given", tensors, opened.config)
    source, config = open_checkpoint(tmp_path / "given", lazy=True)
    with pytest.raises(MappingError, match=gone), open_cut(source, config):
        pass
