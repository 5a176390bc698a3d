"""Does the optimizer follow the recipe: rates, layers, decay, clipping, accumulation, frozen blocks?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError
from vit_ref.finetune.optimizer import find_layer, make_schedule, make_transformation, select_kernels, select_trained
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.step import classification_loss
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer
from vit_ref.weights.pretrained import get_parameters, get_state_parameters

CONFIG = ViTConfig(
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=8,
    patch_size=4,
    num_labels=5,
    initializer_range=0.2,
)


def made() -> VisionTransformer:
    return VisionTransformer(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64)


def images(count: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(count, 8, 8, 3))), jnp.asarray(rng.integers(0, 5, count))


differentiate = nnx.jit(nnx.grad(classification_loss))


@nnx.jit
def update(model: VisionTransformer, optimizer: nnx.Optimizer, gradients: nnx.State) -> None:
    optimizer.update(model, gradients)


def stepped(recipe: Recipe, batches: list, updates: int = 10) -> dict[str, NDArray]:
    """Returns the changes of the parameters by path, in float64.

    A step is that of `train_step`, in two parts: all recipes share the compiled gradients.
    """
    with precision_of(np.float64).active():
        model = made()
        before = get_parameters(model)
        optimizer = nnx.Optimizer(model, make_transformation(recipe, updates, 3), wrt=select_trained(recipe, 3))
        for pixels, labels in batches:
            update(model, optimizer, nnx.filter_state(differentiate(model, pixels, labels), optimizer.wrt))
        return {path: value - before[path] for path, value in get_parameters(model).items()}


@pytest.fixture
def batch() -> tuple[jax.Array, jax.Array]:
    with precision_of(np.float64).active():
        return images(6)


def gradients(pixels: jax.Array, labels: jax.Array) -> dict[str, NDArray]:
    with precision_of(np.float64).active():
        return get_state_parameters(differentiate(made(), pixels, labels))


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        (Recipe(learning_rate=1.0), {0: 1.0, 5: 0.5, 10: 0.0}),
        (Recipe(learning_rate=1.0, schedule="cosine"), {0: 1.0, 5: 0.5, 10: 0.0}),
        (Recipe(learning_rate=1.0, schedule="constant", warmup_ratio=0.2), {0: 1 / 3, 1: 2 / 3, 2: 1.0, 10: 1.0}),
        (Recipe(learning_rate=1.0, schedule="linear", warmup_ratio=0.2), {1: 2 / 3, 2: 1.0, 6: 0.5, 10: 0.0}),
    ],
)
def test_the_rate_rises_and_falls(recipe: Recipe, rates: dict[int, float]) -> None:
    rate = make_schedule(recipe, 10)
    # jax computes it in float32.
    assert {update: float(rate(update)) for update in rates} == pytest.approx(rates, abs=1e-6)


def test_each_lower_layer_learns_more_slowly_by_the_same_factor(batch: tuple) -> None:
    plain = stepped(Recipe(learning_rate=0.1, momentum=0.0), [batch])
    decayed = stepped(Recipe(learning_rate=0.1, momentum=0.0, layer_decay=0.5), [batch])
    heights = {"head": 0, "norm": 0, "blocks.2": 1, "blocks.1": 2, "blocks.0": 3, "patch": 4, "cls": 4, "position": 4}
    for prefix, height in heights.items():
        paths = [path for path in plain if path.startswith(prefix)]
        for path in paths:
            np.testing.assert_allclose(decayed[path], plain[path] * 0.5**height, rtol=1e-9, err_msg=path, atol=1e-18)
        assert any(np.abs(plain[path]).max() > 1e-6 for path in paths)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_kernels_decay_and_nothing_else(optimizer: str, batch: tuple) -> None:
    plain, decayed = (
        stepped(Recipe(learning_rate=0.1, optimizer=optimizer, momentum=0.0, weight_decay=decay), [batch])
        for decay in (0.0, 0.3)
    )
    with precision_of(np.float64).active():
        before = get_parameters(made())
    for path, value in before.items():
        if optimizer == "sgd" or not path.endswith("kernel"):
            expected = plain[path] - (0.1 * 0.3 * value if path.endswith("kernel") else 0)
            # The rate is a float32, 1.5e-8 off, which is 3e-10 of the largest weights. Without decay the bits are
            # equal.
            atol = 1e-9 if path.endswith("kernel") else 0
            np.testing.assert_allclose(decayed[path], expected, rtol=0, atol=atol, err_msg=path)
        else:
            np.testing.assert_allclose(decayed[path], plain[path] - 0.1 * 0.3 * value, rtol=1e-6, err_msg=path)


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters(batch: tuple) -> None:
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients(*batch).values()))
    plain = stepped(Recipe(learning_rate=0.1, momentum=0.0), [batch])
    clipped = stepped(Recipe(learning_rate=0.1, momentum=0.0, grad_clip=norm / 4), [batch])
    for path, change in plain.items():
        np.testing.assert_allclose(clipped[path], change / 4, rtol=1e-9, atol=1e-18, err_msg=path)


def test_accumulated_halves_are_the_whole_batch(batch: tuple) -> None:
    pixels, labels = batch
    halves = [(pixels[:3], labels[:3]), (pixels[3:], labels[3:])]
    whole = stepped(Recipe(learning_rate=0.1), [batch])
    for path, change in stepped(Recipe(learning_rate=0.1, grad_accum_steps=2), halves).items():
        # optax divides by the number of steps in float32. The changes are up to 0.05; half a batch would change others.
        np.testing.assert_allclose(change, whole[path], rtol=0, atol=1e-8, err_msg=path)
    half = stepped(Recipe(learning_rate=0.1, grad_accum_steps=2), halves[:1])
    assert all((change == 0).all() for change in half.values())


@pytest.mark.parametrize(
    ("frozen", "moved"),
    [
        (-1, {"head"}),
        (3, {"head", "norm"}),
        (1, {"head", "norm", "blocks.1", "blocks.2"}),
        (0, {"head", "norm", "blocks.0", "blocks.1", "blocks.2", "patch", "cls_token", "position_embeddings"}),
    ],
)
def test_frozen_blocks_stay_as_they_are(frozen: int, moved: set[str], batch: tuple) -> None:
    changes = stepped(Recipe(learning_rate=0.1, freeze_blocks=frozen), [batch])
    found = {path for path, change in changes.items() if (change != 0).any()}
    assert {".".join(path.split(".")[: 2 if path.startswith("blocks") else 1]) for path in found} == moved


def test_more_frozen_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(InputError, match="freeze_blocks is 4: the model has 3 blocks"):
        select_trained(Recipe(freeze_blocks=4), 3)


def test_smoothed_labels_are_a_mean_with_uniform_ones(batch: tuple) -> None:
    pixels, labels = batch
    with precision_of(np.float64).active():
        logits = np.asarray(made()(pixels))
        found = float(classification_loss(made(), pixels, labels, None, 0.1))
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.eye(5)[np.asarray(labels)] + 0.1 / 5
    assert found == pytest.approx(-(target * log_probabilities).sum(-1).mean(), rel=1e-12)


def test_kernels_are_the_matrices_of_dense_layers_and_patches() -> None:
    with precision_of(np.float64).active():
        chosen = nnx.to_flat_state(select_kernels(nnx.state(made(), nnx.Param)))
    decaying = {path[-1]: set() for path, _ in chosen}
    for path, value in chosen:
        decaying[path[-1]].add(value.get_value())
    assert decaying.pop("kernel") == {True}
    assert set(map(frozenset, decaying.values())) == {frozenset({False})}


def test_layers_are_counted_from_the_embeddings() -> None:
    assert [find_layer(path, 12) for path in (("patch",), ("blocks", 0), ("blocks", 11), ("norm",), ("head",))] == [
        0,
        1,
        12,
        13,
        14,
    ]
