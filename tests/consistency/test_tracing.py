"""Is what is traced clean: no leaked tracers, no calls to the host, no implicit promotion?"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array

from vit_ref.verify.cases import CASES

pytestmark = pytest.mark.consistency

SMALL = [case for case in CASES.values() if case.name != "vit-b16"]


def _differentiated(example, cross_entropy, **options: bool) -> tuple[Callable, tuple]:
    model, *batch = example(**options)
    graph, state = nnx.split(model)

    def step(state: nnx.State, *batch: Array) -> tuple[tuple[Array, Array], nnx.State]:
        return jax.value_and_grad(lambda state: cross_entropy(nnx.merge(graph, state), *batch), has_aux=True)(state)

    return step, (state, *batch)


@pytest.mark.parametrize("training", [False, True])
def test_no_tracer_outlives_its_trace(training: bool, example, cross_entropy) -> None:
    step, arguments = _differentiated(example, cross_entropy, training=training)
    with jax.checking_leaks():
        jax.eval_shape(step, *arguments)


def test_a_tap_that_keeps_a_tracer_is_found(example) -> None:
    model, pixels, *_ = example()
    graph, state = nnx.split(model)
    kept = []

    def run(state: nnx.State, pixels: Array) -> Array:
        return nnx.merge(graph, state)(
            pixels, tap=lambda site, value: kept.append(value) or value if site == "logits" else value
        )

    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked trace"):
        jax.eval_shape(run, state, pixels)


@pytest.mark.parametrize("training", [False, True])
def test_a_step_has_no_effects_and_calls_nothing_on_the_host(training: bool, example, cross_entropy) -> None:
    """`jax.transfer_guard` sees arguments come in, but on the CPU neither callbacks nor what goes out."""
    step, arguments = _differentiated(example, cross_entropy, training=training)
    traced = jax.jit(step).trace(*arguments)
    assert not traced.jaxpr.effects
    lowered = traced.lower().as_text()
    assert "stablehlo.dot_general" in lowered
    assert not [
        word for word in ("callback", "infeed", "outfeed", "send", "recv", "annotate_device") if word in lowered
    ]


def test_the_whole_run_is_strict() -> None:
    with pytest.raises(jax.errors.TypePromotionError if hasattr(jax.errors, "TypePromotionError") else TypeError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)
