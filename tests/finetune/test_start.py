"""Does a run start from the checkpoint's backbone, with the recipe's head, size and precision?"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vit_ref
from tests.helpers.jaxprs import computed_in
from vit_ref.errors import InputError
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.start import SCRATCH, make_starting_model
from vit_ref.finetune.step import split_step, train_step
from vit_ref.model import attention
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer, resize_positions
from vit_ref.preprocessing import steps
from vit_ref.weights.pretrained import get_parameters

CONFIG = ViTConfig(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    image_size=12,
    patch_size=4,
    num_labels=3,
    labels=("cat", "dog", "owl"),
    hidden_dropout_prob=0.1,
    preprocessor={"size": {"height": 12, "width": 12}, "image_mean": [0.4, 0.5, 0.6], "image_std": 0.25},
    initializer_range=0.3,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    vit_ref.save_pretrained(VisionTransformer(CONFIG, rngs=nnx.Rngs(0)), tmp_path / "saved")
    return tmp_path / "saved"


def test_a_fresh_head_is_zero_and_the_backbone_the_checkpoints(saved: Path) -> None:
    model = make_starting_model(saved, ["a", "b", "c", "d", "e"], Recipe())
    found, before = get_parameters(model), get_parameters(vit_ref.from_pretrained(saved))
    assert found["head.kernel"].shape == (12, 5) and not found["head.kernel"].any()
    assert found["head.bias"].shape == (5,) and not found["head.bias"].any()
    backbone = [path for path in before if not path.startswith("head")]
    assert all(found[path].tobytes() == before[path].tobytes() for path in backbone)
    assert found.keys() == before.keys()
    assert model.config.labels == ("a", "b", "c", "d", "e")
    assert model.config.preprocessor == CONFIG.preprocessor


def test_the_new_classes_are_what_is_saved(saved: Path, tmp_path: Path) -> None:
    vit_ref.save_pretrained(make_starting_model(saved, ["a", "b"], Recipe()), tmp_path / "new")
    config = vit_ref.from_pretrained(tmp_path / "new").config
    assert (config.labels, config.num_labels) == (("a", "b"), 2)


def test_a_backbone_without_head_loses_its_pooler(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_labels=0, labels=(), pooler=True)
    vit_ref.save_pretrained(VisionTransformer(config, rngs=nnx.Rngs(0)), tmp_path)
    model = make_starting_model(tmp_path, ["a", "b"], Recipe())
    assert not any(path.startswith("pooler") for path in get_parameters(model))
    assert jax.eval_shape(model, jnp.ones((1, 12, 12, 3))).shape == (1, 2)


def test_a_kept_head_needs_its_own_classes(saved: Path) -> None:
    model = make_starting_model(saved, ("cat", "dog", "owl"), Recipe(head="keep"))
    kept, before = get_parameters(model), get_parameters(vit_ref.from_pretrained(saved))
    assert all(kept[path].tobytes() == before[path].tobytes() for path in before)
    with pytest.raises(InputError, match=r"its head has the classes cat, dog, owl \(3\), and the data has dog, cat"):
        make_starting_model(saved, ("dog", "cat", "owl"), Recipe(head="keep"))


def described(directory: Path, **fields: Any) -> Path:
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return directory


OF_THE_OLD_HEAD = {
    "problem_type": "multi_label_classification",
    "finetuning_task": "which animals",
    "function_to_apply": "none",
    "id2label": {"0": "cat", "1": "dog", "2": "owl"},
    "label2id": {"cat": 0, "dog": 1, "owl": 2},
    "num_classes": 3,
    "task_specific_params": {"threshold": 0.3},
    "pooler_act": "relu",
}


# Other classes, and the same ones, whose names alone would keep the old mapping.
@pytest.mark.parametrize("classes", [("a", "b"), ("cat", "dog", "owl")])
def test_a_fresh_head_drops_the_description_of_the_old_one(
    classes: tuple[str, ...], saved: Path, tmp_path: Path
) -> None:
    model = make_starting_model(described(saved, **OF_THE_OLD_HEAD, license="x"), classes, Recipe())
    vit_ref.save_pretrained(model, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_bytes())
    assert config["license"] == "x"
    assert config["id2label"] == {str(i): name for i, name in enumerate(classes)}
    assert config["label2id"] == {name: i for i, name in enumerate(classes)}
    left = {name: config[name] for name in OF_THE_OLD_HEAD if name in config and name not in ("id2label", "label2id")}
    assert left == {"pooler_act": "tanh"}


def test_a_kept_head_keeps_its_description(saved: Path) -> None:
    source = described(saved, problem_type="single_label_classification", finetuning_task="which animal")
    config = make_starting_model(source, ("cat", "dog", "owl"), Recipe(head="keep")).config.to_hf()
    assert (config["problem_type"], config["finetuning_task"]) == ("single_label_classification", "which animal")


@pytest.mark.parametrize(
    ("classes", "problem_type", "said"),
    [
        (CONFIG.labels, "multi_label_classification", "problem_type is multi_label_classification"),
        (CONFIG.labels, "regression", "problem_type is regression"),
        (("cat",), None, "it has one label"),
    ],
)
def test_a_head_that_cross_entropy_cannot_train_is_not_kept(
    classes: tuple[str, ...], problem_type: str | None, said: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, num_labels=len(classes), labels=classes, extra={"problem_type": problem_type})
    vit_ref.save_pretrained(VisionTransformer(config, rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(InputError) as caught:
        make_starting_model(tmp_path, classes, Recipe(head="keep"))
    assert str(caught.value) == (
        f"{tmp_path}: its head does not choose one of several classes ({said}), and cross-entropy needs that: take a"
        " fresh head (--head fresh)"
    )
    assert make_starting_model(tmp_path, classes, Recipe()).config.extra.get("problem_type") is None


def test_another_image_size_resizes_positions_and_preprocessing(saved: Path) -> None:
    model = make_starting_model(saved, ["a", "b"], Recipe(image_size=20))
    before = get_parameters(vit_ref.from_pretrained(saved))["position_embeddings"]
    resized = np.asarray(resize_positions(jnp.asarray(before), (3, 3), (5, 5)))
    np.testing.assert_array_equal(get_parameters(model)["position_embeddings"], resized)
    assert resized.shape == (1, 26, 12)
    assert model.config.image_hw == (20, 20)
    assert model.config.preprocessor == {**CONFIG.preprocessor, "size": {"height": 20, "width": 20}}


def test_another_image_size_keeps_the_part_that_is_cropped(saved: Path) -> None:
    settings = {"size": 16, "do_center_crop": True, "crop_size": 12}
    (saved / "preprocessor_config.json").write_text(json.dumps(settings))
    found = make_starting_model(saved, ["a", "b"], Recipe(image_size=20)).config.preprocessor
    assert found == {
        "do_center_crop": True,
        "size": {"height": 27, "width": 27},
        "crop_size": {"height": 20, "width": 20},
    }


@pytest.mark.parametrize(
    ("preprocessor", "scratch"), [(None, True), (None, False), ({"image_mean": 0.25}, False)], ids=str
)
def test_preprocessing_that_is_not_written_down_is_saved_in_full(
    preprocessor: dict[str, Any] | None, scratch: bool, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, preprocessor=preprocessor)
    vit_ref.save_pretrained(VisionTransformer(config, rngs=nnx.Rngs(0)), tmp_path / "source")
    # A recipe with an image size writes one, too.
    model = make_starting_model(None if scratch else tmp_path / "source", ["a", "b"], Recipe())
    side = model.config.image_hw[0]
    vit_ref.save_pretrained(model, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "preprocessor_config.json").read_bytes())
    # transformers' own default would be 224.
    assert written["size"] == {"height": side, "width": side}
    assert written["image_mean"] == (0.25 if preprocessor else [0.5, 0.5, 0.5])
    assert steps(vit_ref.from_pretrained(tmp_path / "new").config) == steps(
        dataclasses.replace(config, image_size=(side, side))
    )


def test_positions_in_bfloat16_are_resized_in_float32(saved: Path, tmp_path: Path) -> None:
    model = vit_ref.from_pretrained(saved)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model)))
    vit_ref.save_pretrained(model, tmp_path)
    found = make_starting_model(tmp_path, ["a", "b"], Recipe(image_size=20)).position_embeddings[...]
    stored = get_parameters(model)["position_embeddings"].astype(np.float32)
    expected = resize_positions(jnp.asarray(stored), model.config.grid(), (5, 5))
    # The same operations on the same values. In bfloat16 they would be off by some 1e-3.
    np.testing.assert_array_equal(found, expected)


def test_a_run_from_a_bfloat16_checkpoint_is_saved_as_float32(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_bytes())
    (saved / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    vit_ref.save_pretrained(make_starting_model(saved, ["a", "b"], Recipe()), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_bytes())["torch_dtype"] == "float32"


def test_the_recipes_dropout_replaces_the_checkpoints(saved: Path) -> None:
    assert make_starting_model(saved, ["a", "b"], Recipe()).config.hidden_dropout_prob == 0.1
    config = make_starting_model(saved, ["a", "b"], Recipe(dropout=0.2)).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.2)


@pytest.mark.parametrize("scratch", [True, False])
def test_the_recipes_attention_is_the_models(scratch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fused = None if scratch else tmp_path, Recipe(attention="cudnn", precision="mixed")
    wide = VisionTransformer(dataclasses.replace(CONFIG, hidden_size=24), rngs=nnx.Rngs(0))  # 8 a head
    vit_ref.save_pretrained(wide, tmp_path)
    monkeypatch.setattr(attention, "_capability", lambda: 0.0)
    with pytest.raises(InputError, match=r"cuDNN's attention needs an NVIDIA GPU, "):
        make_starting_model(source, ["a", "b"], fused)
    monkeypatch.setattr(attention, "_capability", lambda: 8.0)
    with pytest.raises(InputError, match=r"^the model's attention dropout is 0.1, and cuDNN's attention has none"):
        make_starting_model(source, ["a", "b"], dataclasses.replace(fused, dropout=0.1))
    taken = [make_starting_model(source, ["a", "b"], recipe).blocks[1].attn.attend for recipe in (fused, Recipe())]
    assert taken == [attention.cudnn, attention.attend]


def test_heads_that_cudnn_does_not_take_are_said_before_training(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_capability", lambda: 8.0)
    with pytest.raises(
        InputError, match="heads are 4 wide, and cuDNN's attention takes a multiple of 8, here at most 128:"
    ):
        make_starting_model(saved, ["a", "b"], Recipe(attention="cudnn", precision="mixed"))


def test_from_scratch_the_seed_decides() -> None:
    first, again, other = (
        get_parameters(make_starting_model(None, ["a", "b"], Recipe(seed=seed)))["patch.kernel"] for seed in (0, 0, 1)
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert make_starting_model(None, ["a", "b"], Recipe(image_size=16)).config == dataclasses.replace(
        SCRATCH, image_size=16, num_labels=2
    )


def test_parameters_moments_and_loss_are_float32_in_mixed(saved: Path) -> None:
    half = {path: value.astype(jnp.bfloat16) for path, value in get_parameters(vit_ref.from_pretrained(saved)).items()}
    model = vit_ref.from_pretrained(saved)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model)))
    vit_ref.save_pretrained(model, saved.parent / "half")
    model = make_starting_model(saved.parent / "half", ["a", "b"], Recipe(precision="mixed"))
    assert {value.dtype for value in get_parameters(model).values()} == {np.dtype(np.float32)}
    assert (get_parameters(model)["patch.kernel"] == half["patch.kernel"].astype(np.float32)).all()
    dtypes: dict[str, np.dtype] = {}

    def tap(site: str, value: jax.Array) -> jax.Array:
        dtypes[site] = value.dtype
        return value

    jax.eval_shape(partial(model, tap=tap), jnp.ones((1, 12, 12, 3)))
    assert dtypes["block.0.mlp.hidden"] == jnp.bfloat16
    assert dtypes["block.0.mlp.residual"] == dtypes["norm"] == jnp.float32
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    with jax.numpy_dtype_promotion("standard"):
        after, loss = jax.eval_shape(partial(split_step, graph), state, jnp.ones((2, 12, 12, 3)), jnp.array([0, 1]))
    # Parameters and moments; a count has no axes.
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {np.dtype(np.float32)}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert loss.dtype == jnp.float32


def test_float32_parameters_keep_updates_too_small_for_bfloat16(saved: Path) -> None:
    model = make_starting_model(saved, ["a", "b"], Recipe(precision="mixed", head="fresh", dropout=0.0))
    before, seen = get_parameters(model), set()

    def see(gradients: Any, _: Any) -> Any:
        seen.update(leaf.dtype for leaf in jax.tree.leaves(gradients))
        return gradients

    # Adam moves a parameter by at most its rate each step, whatever the size of its gradient.
    rate, steps = 2e-6, 3
    optimizer = nnx.Optimizer(model, optax.chain(optax.stateless(see), optax.adam(rate)), wrt=nnx.Param)
    pixels = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    step = nnx.jit(train_step)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            step(model, optimizer, pixels, jnp.array([0, 1]))
    assert seen == {np.dtype(np.float32)}
    kernel = "blocks.0.mlp.fc1.kernel"
    moved = np.abs(get_parameters(model)[kernel] - before[kernel])
    # All steps that bfloat16 can represent at the parameters' size are larger.
    resolution = np.sqrt(np.square(before[kernel]).mean()) * float(jnp.finfo(jnp.bfloat16).eps)
    assert (moved > 0).mean() > 0.9
    assert moved.max() <= 1.1 * steps * rate < resolution / 10
    # The softmaxes, the norms, the logarithm of the loss, and Adam's root. Not exp: GELU's derivative has one in
    # bfloat16.
    needs_float32 = {"reduce_max", "rsqrt", "log", "sqrt"}
    graph, state = nnx.split((model, optimizer))

    def pure(state: nnx.State) -> tuple[jax.Array, nnx.State]:
        both = nnx.merge(graph, state)
        loss = train_step(*both, pixels, jnp.array([0, 1]))
        return loss, nnx.state(both)

    with jax.numpy_dtype_promotion("standard"):
        traced = jax.make_jaxpr(pure)(state).jaxpr
    found = computed_in(traced, needs_float32)
    assert set(found) == needs_float32
    assert set().union(*found.values()) == {np.dtype(np.float32)}, found
