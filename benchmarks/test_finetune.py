"""Does a run wait for the loader or for the step? Times each alone, and both as in a run, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from vit_ref.finetune.augmentation import Augmentation
from vit_ref.finetune.data import open_dataset
from vit_ref.finetune.loading import Batches, load_batches
from vit_ref.finetune.mesh import choose_shardings, divide_batch, make_mesh
from vit_ref.finetune.optimizer import make_transformation
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.run import compile_step
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer

pytestmark = pytest.mark.skipif(
    find_spec("grain") is None, reason="fine-tuning needs grain: pip install 'vit-ref[finetune]'"
)

CONFIG = ViTConfig.variant("Ti/16", num_labels=4, image_size=96)
RECIPE = Recipe(batch_size=16)


def _loader() -> Batches:
    training = open_dataset(None, "train")
    options: dict[str, Any] = {"batch_size": RECIPE.batch_size, "seed": 0, "epochs": 100}
    return load_batches(training, CONFIG, augment=Augmentation(), **options)


def _step() -> Callable[[dict[str, np.ndarray]], jax.Array]:
    model = VisionTransformer(CONFIG, rngs=nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, make_transformation(RECIPE, 1000, CONFIG.num_hidden_layers), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    mesh = make_mesh(RECIPE.batch_size)
    learn = compile_step(graph, choose_shardings(state, CONFIG, mesh, "data"), mesh, RECIPE)
    held = [state]

    def step(batch: dict[str, np.ndarray]) -> jax.Array:
        pixels, labels = divide_batch(batch["pixels"], mesh), divide_batch(batch["label"], mesh)
        held[0], loss = learn(held[0], pixels, labels, np.int32(1))
        return loss

    return step


@pytest.mark.benchmark(group="fine-tuning, Ti/16 at 96 pixels, batch 16", min_rounds=10)
@pytest.mark.parametrize("part", ["loader", "step", "both"])
def test_finetune(benchmark: Any, part: str) -> None:
    loader = _loader()
    batch = next(loader)
    step = None if part == "loader" else _step()
    if step is None:
        # A fixed number of rounds, because the loader returns its first batches, loaded ahead, within microseconds.
        benchmark.pedantic(lambda: next(loader), rounds=100, warmup_rounds=20)
    elif part == "step":
        assert np.isfinite(step(batch))
        benchmark(lambda: jax.block_until_ready(step(batch)))
    else:
        step(batch)
        benchmark(lambda: jax.block_until_ready(step(next(loader))))
    loader.close()
    benchmark.extra_info["images/s"] = RECIPE.batch_size / benchmark.stats.stats.median
