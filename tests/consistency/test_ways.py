"""Do all ways of running the model compute the same, in one trace, without calling the host?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tests.helpers.precisions import precision_of
from vit_ref.verify.gates import error, root_mean_square

# These tests are about the results of compiled programs.
pytestmark = pytest.mark.optimised

Objective = Callable[..., tuple[Array, Array]]
# ((loss, logits), gradient), as value_and_grad returns them
Result = tuple[tuple[Array, Array], nnx.State]
Way = Callable[..., Result]

# Bounds on the difference from eager mode, as relative root mean squares in units of the dtype's rounding. All ways add
# the same products. They differ in the order of sums, and in the operations that are fused into one rounding.
# Logits: some fifty random roundings of a third of a unit each are sqrt(50) / 3 = 2.4. In bfloat16 the stream is
# float32,
# so there are fewer.
LOGITS = 10
# Gradients: that of the scores is P (dP - sum(P dP)), a difference of near equals that loses a digit, so query and key
# are worst. Another dropout mask, or exchanged images, makes a million units in float32.
GRADIENTS = 100


def eager(objective: Objective) -> Way:
    return nnx.value_and_grad(objective, has_aux=True)


def nnx_jit(objective: Objective) -> Way:
    return nnx.jit(eager(objective))


def nnx_remat(objective: Objective) -> Way:
    return nnx.jit(eager(nnx.remat(objective)))


def _pure(objective: Objective) -> Callable[..., Result]:
    def pure(graph: nnx.GraphDef, state: nnx.State, *batch: Array) -> Result:
        return jax.value_and_grad(lambda state: objective(nnx.merge(graph, state), *batch), has_aux=True)(state)

    return pure


def jax_jit(objective: Objective) -> Way:
    pure = jax.jit(_pure(objective), static_argnums=0)
    return lambda model, *batch: pure(*nnx.split(model), *batch)


def jax_checkpoint(objective: Objective) -> Way:
    @partial(jax.jit, static_argnums=0)
    def pure(graph: nnx.GraphDef, state: nnx.State, *batch: Array) -> Result:
        loss = jax.checkpoint(lambda state: objective(nnx.merge(graph, state), *batch))
        return jax.value_and_grad(loss, has_aux=True)(state)

    return lambda model, *batch: pure(*nnx.split(model), *batch)


def ahead_of_time_and_donated(objective: Objective) -> Way:
    # The gradient reuses the buffers of the parameters. If jax cannot reuse one it warns, and a warning is an error.
    pure = jax.jit(_pure(objective), static_argnums=0, donate_argnums=1)
    compiled: list[jax.stages.Compiled] = []

    def run(model: nnx.Module, *batch: Array) -> Result:
        graph, state = nnx.split(model)
        if not compiled:
            compiled.append(pure.lower(graph, state, *batch).compile())
        given = jax.tree.map(jnp.copy, state)
        result = compiled[0](given, *batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        return result

    return run


def vmap_over_images(objective: Objective) -> Way:
    @partial(jax.jit, static_argnums=0)
    def pure(graph: nnx.GraphDef, state: nnx.State, pixels: Array, labels: Array, key: Array) -> Result:
        def one(image: Array, label: Array) -> Result:
            return _pure(objective)(graph, state, image[None], label[None], key)

        (losses, logits), gradients = jax.vmap(one)(pixels, labels)
        return (losses.mean(), logits[:, 0]), jax.tree.map(lambda x: x.mean(axis=0), gradients)

    return lambda model, *batch: pure(*nnx.split(model), *batch)


class Prepared(NamedTuple):
    """A way of running the loss, the number of its traces so far, and the example to run it on."""

    run: Way
    traces: list[None]
    example: partial[tuple]


# Remat runs the forward pass twice, so it is tested in training: both passes have to drop the same values.
EVALUATED = (nnx_jit, jax_jit, ahead_of_time_and_donated, vmap_over_images)
TRAINED = (nnx_remat, jax_checkpoint)


def _param(way: Callable[[Objective], Way]) -> object:
    training = way in TRAINED
    # Under pytest-xdist one worker runs all comparisons with the same run of eager mode.
    group = pytest.mark.xdist_group("ways-training" if training else "ways-evaluation")
    return pytest.param((way, training), id=way.__name__.replace("_", "-"), marks=group)


@pytest.fixture(scope="module", params=[_param(way) for way in EVALUATED + TRAINED])
def prepared(request: pytest.FixtureRequest, example, cross_entropy: Objective) -> Prepared:
    way, training = request.param
    traces: list[None] = []

    def counted(*arguments: object) -> tuple[Array, Array]:
        traces.append(None)
        return cross_entropy(*arguments)

    return Prepared(way(counted), traces, partial(example, training=training))


@pytest.fixture(scope="module")
def eagerly(example, cross_entropy: Objective) -> Callable[[int, bool], Result]:
    """`eagerly(seed, training)`: operation by operation, once for all ways."""
    return cache(lambda seed, training: eager(cross_entropy)(*example(seed=seed, training=training)))


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_logits_and_gradients_are_those_of_eager_mode(
    seed: int, prepared: Prepared, eagerly: Callable[[int, bool], Result]
) -> None:
    (loss, logits), gradients = prepared.run(*prepared.example(seed=seed))
    (eager_loss, eager_logits), eager_gradients = eagerly(seed, prepared.example.keywords["training"])
    chex.assert_trees_all_equal_structs(gradients, eager_gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes((loss, logits), (eager_loss, eager_logits))
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, eager_gradients)
    unit = np.finfo(np.float32).eps
    # The loss is one number of the order of one, and may differ as much as a logit.
    assert abs(float(loss) - float(eager_loss)) <= LOGITS * unit * root_mean_square(np.asarray(eager_logits))
    assert error(np.asarray(logits), np.asarray(eager_logits, np.float64)).rms <= LOGITS * unit
    found, expected = (
        {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(tree)}
        for tree in (gradients, eager_gradients)
    )
    # A softmax does not change when all its scores shift, so the gradient of a key's bias is zero, and its computed
    # value
    # is rounding. The scale is that of the query's bias, a sum over as many tokens.
    scale = {path: root_mean_square(expected[path.replace("key.bias", "query.bias")]) for path in expected}
    units = {path: root_mean_square(found[path] - expected[path]) / scale[path] / unit for path in expected}
    assert max(units.values()) <= GRADIENTS, max(units, key=units.get)


def test_new_weights_images_and_seeds_do_not_trace_again(prepared: Prepared) -> None:
    prepared.run(*prepared.example(seed=0))
    once = len(prepared.traces)
    prepared.run(*prepared.example(seed=1))
    assert (once, len(prepared.traces)) == (1, 1)


def test_what_is_compiled_asks_nothing_of_the_host(prepared: Prepared) -> None:
    arguments = prepared.example()
    prepared.run(*arguments)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(prepared.run(*arguments))


def test_the_dropout_stream_advances_under_jit_as_eagerly(example) -> None:
    model, pixels, *_ = example(training=True)
    eager_rngs, rngs = nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)
    forward = nnx.jit(lambda model, pixels, rngs: model(pixels, rngs=rngs))
    first, second = (forward(model, pixels, rngs) for _ in range(2))
    expected = [np.asarray(model(pixels, rngs=eager_rngs), np.float64) for _ in range(2)]
    # Two different sets of masks change the result by a hundred thousand times the bound.
    assert error(np.asarray(first), expected[0]).rms <= LOGITS * np.finfo(np.float32).eps
    assert error(np.asarray(second), expected[1]).rms <= LOGITS * np.finfo(np.float32).eps
    assert error(np.asarray(second), expected[0]).rms > 0.1
    assert rngs.dropout.count[...] == eager_rngs.dropout.count[...] > 0


class VariantsTest(chex.TestCase):
    """Runs the forward pass in each dtype, with and without jit, with inputs on the device and on the host."""

    @pytest.fixture(autouse=True)
    def _example(self, example) -> None:
        self.example = example

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters(("float32", jnp.float32), ("float64", jnp.float64), ("bfloat16", jnp.bfloat16))
    def test_logits_are_those_of_eager_mode(self, dtype: DTypeLike) -> None:
        with precision_of(dtype).active():
            model, pixels, *_ = self.example(dtype)
            graph, state = nnx.split(model)
            logits = self.variant(lambda state, pixels: nnx.merge(graph, state)(pixels))(state, pixels)
            expected = model(pixels)
        chex.assert_shape(logits, (len(pixels), model.config.num_labels))
        chex.assert_type(logits, dtype)
        unit = float(jnp.finfo(dtype).eps)
        assert error(np.asarray(logits), np.asarray(expected, np.float64)).rms <= LOGITS * unit
