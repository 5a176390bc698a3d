"""What does a training step cost beside its compiled function? One image of a ViT-Ti/16 makes that cost visible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
import pytest
from flax import nnx

from vit_ref.bench.contenders import chain_steps
from vit_ref.bench.workload import Workload
from vit_ref.finetune.step import split_step, train_step
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import Case
from vit_ref.weights.pretrained import build

WORK = Workload("Ti/16", 1, "float32", "train")


def _pair() -> tuple[Any, Any]:
    parameters = OwnCandidate(WORK.config, Case("ti16", WORK.config).checkpoint()).parameters
    model = build(WORK.config, parameters)
    model.train()
    return model, nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)


def _bare() -> Callable[..., Any]:
    """Returns the executable on a flat list of arrays, without NNX and without a cache of signatures."""
    graph, state = nnx.split(_pair())
    leaves, tree = jax.tree.flatten(state)

    def flat(leaves: list[jax.Array], pixels: jax.Array, labels: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        after, loss = split_step(graph, jax.tree.unflatten(tree, leaves), pixels, labels)
        return jax.tree.leaves(after), loss

    images = tuple(map(jax.device_put, WORK.inputs()))
    return chain_steps(jax.jit(flat, donate_argnums=0).lower(leaves, *images).compile(), leaves, *images)


def _split_once() -> Callable[..., Any]:
    """Returns a step as `vit_ref.finetune` has it: a jitted function of the state, which is split once."""
    graph, state = nnx.split(_pair())
    step = jax.jit(partial(split_step, graph), donate_argnums=0)
    return chain_steps(step, state, *map(jax.device_put, WORK.inputs()))


def _nnx_jit() -> Callable[..., Any]:
    """Returns a step by `nnx.jit`, which splits and merges model and optimizer at every step."""
    model, optimizer = _pair()
    pixels, labels = map(jax.device_put, WORK.inputs())
    step = nnx.jit(train_step)

    def run() -> None:
        loss = step(model, optimizer, pixels, labels)
        jax.block_until_ready((nnx.state(model), loss))

    return run


@pytest.mark.benchmark(group=f"dispatch: {WORK}", min_rounds=15)
@pytest.mark.parametrize("way", [_bare, _split_once, _nnx_jit], ids=["bare executable", "split once", "nnx.jit"])
def test_dispatch(benchmark: Any, way: Callable[[], Callable[..., Any]]) -> None:
    run = way()
    run()
    benchmark(run)
