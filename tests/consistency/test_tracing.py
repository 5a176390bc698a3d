"""Is tracing clean: no leaked tracers, no calls to the host, no implicit promotion?"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array

from vit_ref.verify.cases import CASES, Case

# The cases whose formulas differ from those of "rectangular", which all other tests here use.
OTHERS = [CASES[name] for name in ("no-qkv-bias", "one-head", "pooler", "headless", "rectangular-patch")]


@pytest.fixture(params=[False, True], ids=["evaluation", "training"])
def step(request: pytest.FixtureRequest, example, cross_entropy) -> tuple[Callable, tuple]:
    """Returns a function from parameters to loss and gradient, and its arguments."""
    model, *batch = example(training=request.param)
    graph, state = nnx.split(model)

    def differentiate(state: nnx.State, *batch: Array) -> tuple[tuple[Array, Array], nnx.State]:
        return jax.value_and_grad(lambda state: cross_entropy(nnx.merge(graph, state), *batch), has_aux=True)(state)

    return differentiate, (state, *batch)


@contextmanager
def checking_leaks() -> Iterator[None]:
    """Runs `jax.checking_leaks` faster: it searches all objects that are not frozen for references to a tracer."""
    gc.collect()
    gc.freeze()
    with jax.checking_leaks():
        yield


def test_no_tracer_outlives_its_trace(step) -> None:
    differentiate, arguments = step
    with checking_leaks():
        jax.eval_shape(differentiate, *arguments)


def test_a_tap_that_keeps_a_tracer_is_found(example) -> None:
    model, pixels, *_ = example()
    graph, state = nnx.split(model)
    kept: list[Array] = []

    def run(state: nnx.State, pixels: Array) -> Array:
        return nnx.merge(graph, state)(pixels, tap=lambda site, value: kept.append(value) or value)

    with checking_leaks(), pytest.raises(Exception, match="Leaked trace"):
        jax.eval_shape(run, state, pixels)


def test_a_step_calls_nothing_on_the_host(step) -> None:
    """Searches the program, because on a CPU `jax.transfer_guard` sees arguments, but neither callbacks nor results."""
    differentiate, arguments = step
    traced = jax.jit(differentiate).trace(*arguments)
    assert not traced.jaxpr.effects
    program = traced.lower().as_text()
    assert "stablehlo.dot_general" in program
    calls = ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv")
    assert not [call for call in calls if call in program]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (jnp.float32(1), jnp.bfloat16(1), "no available implicit dtype promotion path"),
        (jnp.float32(1), jnp.int32(1), "no available implicit dtype promotion path"),
        ((2, 3), (3,), "jax_numpy_rank_promotion='raise'"),
    ],
)
def test_the_whole_run_is_strict(a, b, message: str) -> None:
    a, b = (jnp.ones(x) if isinstance(x, tuple) else x for x in (a, b))
    with pytest.raises(ValueError, match=message):
        a + b


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_every_formula_traces_under_strictness(case: Case, filled) -> None:
    model = filled(case.config)
    model.train()

    def loss(pixels: Array) -> Array:
        return model(pixels, interpolate_pos_encoding=True, rngs=nnx.Rngs(dropout=0)).sum()

    height, width = case.config.image_hw
    pixels = jax.ShapeDtypeStruct((2, 2 * height, width, case.config.num_channels), jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(jax.grad(loss), pixels), pixels)
