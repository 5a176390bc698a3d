"""Are weights found under the prefixes of training loops, and are the tensors left out that the caller names?"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from flax import serialization, traverse_util
from numpy.typing import NDArray
from safetensors.numpy import save_file

import vit_ref
from tests.helpers.vit_strategies import with_room
from vit_ref.cli.commands import main
from vit_ref.errors import MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import Case
from vit_ref.weights import checkpoint, layouts, mapping, pretrained, tensor_files, wrappers, writing

CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=7,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    image_size=8,
    patch_size=4,
    num_labels=3,
)
TENSORS = Case("wrapped", CONFIG).checkpoint().tensors
PARAMETERS = mapping.port(TENSORS, CONFIG, layouts.HF)
# State beside the weights, in the two forms of flax's optimizers.
STATE = {"opt/state/step": np.int32(7), "opt/state/param_states/head/bias/grad_ema": np.zeros(3, "f4")}


def directory(path: Path, tensors: mapping.Tensors, config: ViTConfig = CONFIG) -> Path:
    writing.write_directory(path, {}, config.to_hf())
    save_file(dict(tensors), path / checkpoint.WEIGHTS)
    return path


def same(path: Path, **options: object) -> bool:
    found = pretrained.get_parameters(vit_ref.from_pretrained(path, **options))
    return found.keys() == PARAMETERS.keys() and all((found[name] == value).all() for name, value in PARAMETERS.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.model."])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_prefix_of_pytorchs_wrappers_is_removed_with_a_warning(
    prefix: str, lazy: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory(tmp_path / "vit", {f"{prefix}{name}": value for name, value in TENSORS.items()})
    with caplog.at_level(logging.WARNING, "vit_ref"):
        found = checkpoint.read(path, lazy=lazy).tensors
    assert caplog.messages == [f"{path}: all weights' names begin with {prefix!r}, which is removed"]
    assert found.keys() == TENSORS.keys()
    assert all((found[name] == value).all() for name, value in TENSORS.items())
    if isinstance(found, tensor_files.LazyTensors):
        assert all(found.shape(name) == value.shape for name, value in TENSORS.items())
    assert same(path)


@pytest.mark.parametrize("layout", [layouts.NPZ, layouts.BIG_VISION], ids=lambda layout: layout.name)
@pytest.mark.parametrize("prefix", ["params/", "opt/target/", "optimizer/target/", "opt/target/params/"])
@pytest.mark.parametrize("state", [{}, STATE], ids=["weights alone", "with state"])
def test_an_npz_of_a_training_loop_is_read(
    layout: layouts.Layout, prefix: str, state: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = with_room(layout, dict(PARAMETERS))
    tensors = mapping.export(parameters, CONFIG, layout)
    np.savez(tmp_path / "ViT.npz", **{f"{prefix}{name}": value for name, value in tensors.items()}, **state)
    model = vit_ref.from_pretrained(tmp_path / "ViT.npz")
    found = pretrained.get_parameters(model)
    assert model.config == CONFIG
    assert all((found[name] == value).all() for name, value in parameters.items())
    (said,) = caplog.messages
    assert said.endswith(", and 2 tensors of training state are left out" if state else "is removed")


def test_a_flax_train_state_is_read(tmp_path: Path) -> None:
    """Reads a state whose step is a plain number, which no weight may be."""
    weights = traverse_util.unflatten_dict(mapping.export(PARAMETERS, CONFIG, layouts.FLAX), sep="/")
    tree = {"step": 7, "params": weights, "opt_state": {"0": {"count": np.int32(7), "mu": weights}, "1": {}}}
    writing.write_directory(tmp_path, {}, CONFIG.to_hf())
    (tmp_path / checkpoint.FLAX_WEIGHTS).write_bytes(serialization.msgpack_serialize(tree))
    assert same(tmp_path)


@pytest.mark.parametrize(
    ("names", "prefix", "weights"),
    [
        (["vit.a", "vit.b"], "", 2),
        (["module.a", "b"], "", 2),
        (["params/a", "b"], "", 2),
        (["opt/state/a"], "", 1),
        (["params/params/a", "opt_state/0/mu/a", "step"], "params/params/", 1),
        (["model.module.a", "model.module.b"], "model.module.", 2),
        ([], "", 0),
    ],
)
def test_what_all_have_in_common_and_nothing_else_is_a_prefix(names: list[str], prefix: str, weights: int) -> None:
    found, kept = wrappers.find_wrapper(names)
    assert (found, len(kept)) == (prefix, weights)


def test_a_prefix_of_most_names_is_named_with_a_way_out(tmp_path: Path) -> None:
    wrapped = {f"model.{name}": value for name, value in TENSORS.items()}
    path = directory(tmp_path / "vit", {**wrapped, "criterion.weight": np.ones(3, "f4")})
    with pytest.raises(MappingError) as caught:
        vit_ref.from_pretrained(path)
    said = f"the prefix 'model.' is removed only if all names begin with it, and 1 of {len(TENSORS) + 1} do not, first"
    assert f"{said} criterion.weight: leave these out with --ignore PATTERN" in str(caught.value)
    assert same(path, ignore=["criterion.*"])


LEFT_OVER: dict[str, tuple[NDArray, str]] = {
    "vit.embeddings.mask_token": (np.zeros((1, 1, 6), "f4"), "it is the mask token of masked-image pretraining"),
    "decoder.0.weight": (np.zeros((48, 6, 1, 1), "f4"), "it belongs to the decoder of masked-image pretraining"),
    "vit.pooler.dense.weight": (np.zeros((6, 6), "f4"), "it belongs to a pooler, and a classifier's head reads"),
    "vit.embeddings.distillation_token": (np.zeros((1, 1, 6), "f4"), "it is DeiT's token for distillation"),
    "vit.encoder.layer.0.attention.attention.query.lora_A": (np.zeros((2, 6), "f4"), "it belongs to a LoRA adapter"),
    "something.else": (np.zeros(1, "f4"), ""),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_a_tensor_that_is_left_over_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    value, known = LEFT_OVER[name]
    path = directory(tmp_path / "vit", {**TENSORS, name: value})
    with pytest.raises(MappingError) as caught:
        vit_ref.from_pretrained(path)
    first, fault, advice = str(caught.value).splitlines()
    assert first == f"{path}: the weights do not fit the configuration (layout hf): 1 unexpected"
    line = f"  unexpected: {name}: it has shape {value.shape}, and no rule takes it"
    assert fault.startswith(f"{line}: {known}") if known else fault == line
    assert advice == "  to leave out unexpected tensors: --ignore PATTERN, or ignore=[PATTERN] in Python"


@pytest.fixture
def leftovers(tmp_path: Path) -> Path:
    return directory(tmp_path / "vit", {**TENSORS, **{name: value for name, (value, _) in LEFT_OVER.items()}})


def run(*arguments: object) -> tuple[int, str]:
    ended = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return ended.exit_code, ended.output


ALL = [word for name in LEFT_OVER for word in ("--ignore", name)]


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["whole", "streamed"])
def test_verify_judges_what_is_not_ignored(options: list[str], leftovers: Path) -> None:
    verify = ["verify", leftovers, "--forward-only", "--reference", "numpy", *options]
    code, said = run(*verify, *ALL)
    assert code == 0, said
    code, said = run(*verify, *ALL[2:])
    assert code == 2 and "1 unexpected" in said and "mask_token" in said


@pytest.mark.torch
def test_pytorchs_reference_is_not_given_what_is_ignored(leftovers: Path) -> None:
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    code, said = run("verify", leftovers, "--forward-only", "--reference", "torch", *ALL)
    assert code == 0, said


def test_a_command_says_that_it_strips_a_prefix(tmp_path: Path) -> None:
    path = directory(tmp_path / "vit", {f"module.{name}": value for name, value in TENSORS.items()})
    ended = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out"), "--to", "hf"])
    assert ended.exit_code == 0, ended.output
    assert ended.stderr == f"vit-ref: {path}: all weights' names begin with 'module.', which is removed\n"


def test_convert_leaves_behind_what_is_ignored(leftovers: Path, tmp_path: Path) -> None:
    assert run("convert", leftovers, tmp_path / "out", "--to", "hf")[0] == 2
    code, said = run("convert", leftovers, tmp_path / "out", "--to", "hf", *ALL)
    assert code == 0, said
    assert checkpoint.read(tmp_path / "out").tensors.keys() == TENSORS.keys()


def test_predict_leaves_behind_what_is_ignored(leftovers: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'vit-ref[images]'")
    image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert run("predict", leftovers, tmp_path / "a.png")[0] == 2
    code, said = run("predict", leftovers, tmp_path / "a.png", "--json", tmp_path / "a.json", *ALL)
    assert code == 0, said
    assert len(json.loads((tmp_path / "a.json").read_text())[0]["predictions"]) == 3


def test_verify_also_refuses_a_pattern_that_matches_nothing(leftovers: Path) -> None:
    for options in ([], ["--stream"]):
        code, said = run("verify", leftovers, "--forward-only", *options, *ALL, "--ignore", "nothing.*")
        assert code == 2
        assert "stale ignore: nothing.*: it matches no left-over tensor: remove the pattern" in said


def test_a_needed_tensor_is_never_left_behind() -> None:
    source = {**TENSORS, "x": np.ones(1, "f4")}
    assert mapping.drop_ignored(source, CONFIG, ["*"]).keys() == TENSORS.keys()


def starting(path: Path, ignore: list[str]) -> ViTConfig:
    from vit_ref.finetune.recipe import Recipe
    from vit_ref.finetune.start import make_starting_model

    return make_starting_model(path, ["a", "b"], Recipe(), ignore).config


def test_finetune_starts_from_what_is_not_ignored(leftovers: Path) -> None:
    assert starting(leftovers, list(LEFT_OVER)).num_labels == 2
    with pytest.raises(MappingError, match="1 unexpected"):
        starting(leftovers, list(LEFT_OVER)[1:])


def test_finetune_takes_ignore(leftovers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_module = pytest.importorskip("vit_ref.finetune.run", reason="needs grain: pip install 'vit-ref[finetune]'")
    given: list[object] = []
    stopped: Callable[..., None] = lambda *arguments, ignore, **options: given.append(ignore) or _stop()  # noqa: E731
    monkeypatch.setattr(run_module, "finetune", stopped)
    run("finetune", leftovers, "--no-plots", "--ignore", "a", "--ignore", "b*")
    assert given == [("a", "b*")]


def _stop() -> None:
    raise vit_ref.InputError("stop here")
