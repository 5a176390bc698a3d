"""Do extreme but finite inputs give finite values and gradients, without any NaN on the way?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.trace import Trace
from vit_ref.weights.pretrained import build, get_parameters

pytestmark = pytest.mark.xdist_group("extremes")

CONFIG = CASES["rectangular"].config
Parameters = dict[str, NDArray]


def _scores(trace: Trace, block: int) -> NDArray:
    query, key = (trace[f"block.{block}.attn.{role}"].astype(np.float64) for role in ("query", "key"))
    return np.einsum("bqhk,bmhk->bhqm", query, key) / np.sqrt(CONFIG.head_dim)


class Extreme(NamedTuple):
    """An extreme case: its change of parameters and pixels, and the check that the trace shows it."""

    apply: Callable[[Parameters, NDArray], NDArray]
    reached: Callable[[Trace], bool]


def constant_image(value: float) -> Extreme:
    def reached(trace: Trace) -> bool:
        patches = trace["patches"]
        return bool((patches == patches[:1, :1]).all() and np.abs(patches).max() >= abs(value))

    return Extreme(lambda parameters, pixels: np.full_like(pixels, value), reached)


def one_pixel(value: float) -> Extreme:
    def apply(parameters: Parameters, pixels: NDArray) -> NDArray:
        pixels = np.zeros_like(pixels)
        pixels[:, 3, 4] = value
        return pixels

    return Extreme(apply, lambda trace: bool(np.abs(trace["patches"]).max() > abs(value) / 10))


def all_scores(value: float) -> Extreme:
    """Makes all scores equal and huge. A softmax without a shift would divide infinities, or zeros."""

    def apply(parameters: Parameters, pixels: NDArray) -> NDArray:
        # head_dim products of s * s / sqrt(head_dim)
        s = np.sqrt(abs(value) / np.sqrt(CONFIG.head_dim))
        for path in parameters:
            if ".attn.query." in path or ".attn.key." in path:
                bias = s if ".query." in path else np.copysign(s, value)
                parameters[path] = np.full_like(parameters[path], bias if path.endswith("bias") else 0)
        return pixels

    # bfloat16 rounds query and key to 1 part in 256.
    return Extreme(apply, lambda trace: all(np.allclose(_scores(trace, i), value, rtol=2**-7) for i in (0, 1)))


def scores_far_apart() -> Extreme:
    """Spreads scores from -10^4 to 10^4. Most probabilities underflow to zero."""

    def apply(parameters: Parameters, pixels: NDArray) -> NDArray:
        for path in parameters:
            if ".attn.query." in path:
                parameters[path] = parameters[path] * np.float32(1000)
        return pixels

    def reached(trace: Trace) -> bool:
        return all(_scores(trace, i).min() < -1e4 and _scores(trace, i).max() > 1e4 for i in (0, 1))

    return Extreme(apply, reached)


def constant_tokens(value: float) -> Extreme:
    """Makes tokens constant. Every LayerNorm, and its gradient, divides by sqrt(0 + epsilon), one millionth."""

    def apply(parameters: Parameters, pixels: NDArray) -> NDArray:
        for path in parameters:
            if path in ("cls_token", "patch.bias"):
                parameters[path] = np.full_like(parameters[path], value)
            elif path in ("position_embeddings", "patch.kernel") or ".attn.out." in path or ".mlp.fc2." in path:
                parameters[path] = np.zeros_like(parameters[path])
        return pixels

    streams = ("embeddings", "block.0.attn.residual", "block.0.mlp.residual", "block.1.mlp.residual")
    return Extreme(apply, lambda trace: all((trace[site] == value).all() for site in streams))


EXTREMES = {
    "zero-images": constant_image(0.0),
    # Subnormal in float32.
    "tiny-images": constant_image(1e-40),
    # The square of a token, which is part of its variance, just stays below float32's 3e38.
    "huge-images": constant_image(1e18),
    "huge-negative-images": constant_image(-1e18),
    # Here it overflows, and LayerNorm divides by infinity. From 1e37 on the patches themselves overflow.
    "overflowing-variance": constant_image(1e30),
    "one-huge-pixel": one_pixel(1e30),
    "all-scores-1e4": all_scores(1e4),
    "all-scores--1e4": all_scores(-1e4),
    "scores-far-apart": scores_far_apart(),
    "tokens-of-zeros": constant_tokens(0.0),
    "tokens-of-ones": constant_tokens(1.0),
    "tokens-of-1e15": constant_tokens(2.0**50),
}


@pytest.fixture(scope="module")
def differentiate() -> Callable[..., tuple]:
    """Returns the values at all sites, and the compiled gradients for parameters and pixels with and without a tap."""

    def loss(graph: nnx.GraphDef, state: nnx.State, pixels: Array) -> tuple[Array, dict[str, Array]]:
        model, trace = nnx.merge(graph, state), {}
        plain, observed = model(pixels), model(pixels, tap=trace.setdefault)
        wide = jnp.promote_types(observed.dtype, jnp.float32)
        return sum(jax.nn.logsumexp(logits.astype(wide), axis=-1).sum() for logits in (plain, observed)), trace

    return jax.jit(jax.value_and_grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES.keys())
def test_values_and_gradients_are_finite(extreme: Extreme, dtype: DTypeLike, example, differentiate) -> None:
    with precision_of(dtype).active(), jax.debug_nans(True):
        model, pixels, *_ = example(dtype)
        parameters = get_parameters(model)
        pixels = extreme.apply(parameters, np.asarray(pixels))
        graph, state = nnx.split(build(CONFIG, parameters, dtype=dtype))
        (loss, trace), gradients = differentiate(graph, state, pixels)
    assert extreme.reached({site: np.asarray(value) for site, value in trace.items()})
    chex.assert_tree_all_finite((loss, trace, gradients))
