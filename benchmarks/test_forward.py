"""Forward throughput of the model beside FlaxViT: one process, one group, so that the table shows the ratio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_ref.config import ViTConfig
from vit_ref.pretrained import build
from vit_ref.verify.candidate import OwnCandidate
from vit_ref.verify.cases import Case
from vit_ref.verify.flaxvit import FlaxViTReference

CASE = Case("ti16", ViTConfig.variant("Ti/16", num_labels=10), batch=8)
Run = Callable[[Any, jax.Array], jax.Array]


def _ours() -> tuple[Run, Any]:
    graph, state = nnx.split(build(CASE.config, OwnCandidate(CASE.config, CASE.checkpoint()).parameters))
    return jax.jit(lambda state, pixels: nnx.merge(graph, state)(pixels)), state


def _flaxvit() -> tuple[Run, Any]:
    reference = FlaxViTReference(CASE.config, CASE.checkpoint().tensors)
    module = reference.module(np.float32)
    return jax.jit(lambda params, pixels: module.apply({"params": params}, pixels).logits), reference.params


@pytest.mark.benchmark(group="forward, Ti/16, batch 8, float32")
@pytest.mark.parametrize("implementation", [_ours, _flaxvit], ids=["vit_ref", "FlaxViT"])
def test_forward(benchmark: Any, implementation: Callable[[], tuple[Run, Any]]) -> None:
    run, parameters = implementation()
    pixels = jax.device_put(CASE.images())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        logits = run(parameters, pixels)
        assert logits.shape == (CASE.batch, CASE.config.num_labels) and jnp.isfinite(logits).all()
        benchmark(lambda: jax.block_until_ready(run(parameters, pixels)))
    benchmark.extra_info["images/s"] = CASE.batch / benchmark.stats.stats.median
