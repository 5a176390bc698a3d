"""Does dropout act at the right places, rate and strength, independently, and in training alone?

All randomness has fixed seeds. With other seeds a test's bounds would fail by chance less than once in 10^6 runs: they
are Hoeffding's, and the comparisons of a test share that chance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from numpy.typing import NDArray

from tests.helpers.precisions import precision_of
from vit_ref.errors import ConfigError
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.gates import error
from vit_ref.verify.references.flax_vit import FlaxViTReference
from vit_ref.weights.pretrained import build

Filled = Callable[..., VisionTransformer]
Trace = dict[str, jax.Array]

# Two rates, so that neither can replace the other, and fewer tokens (5) than features in a head (11): see
# `multipliers`.
RATE, ATTENTION_RATE = 0.3, 0.45
CONFIG = dataclasses.replace(
    CASES["rectangular"].config,
    hidden_dropout_prob=RATE,
    attention_probs_dropout_prob=ATTENTION_RATE,
    image_size=(5, 20),
)
BATCH, TOKENS, HEADS = 3, 5, CONFIG.num_attention_heads
CASE = Case("dropout", CONFIG, batch=BATCH, seed=20)

# The sites right behind a dropout, and the axes of its mask.
HIDDEN_AXES = ("place", "seed", "batch", "token", "feature")
HIDDEN = ["embeddings", *(f"block.{i}.{part}.residual" for i in (0, 1) for part in ("attn", "mlp"))]
ATTENTION_AXES = ("place", "seed", "batch", "head", "query", "key")
ATTENTION = ["block.0.attn.context", "block.1.attn.context"]
RATES = {**dict.fromkeys(HIDDEN, RATE), **dict.fromkeys(ATTENTION, ATTENTION_RATE)}

SEEDS = 1024
CHANCE = 1e-6


def hoeffding(draws: int, comparisons: int) -> float:
    """Returns how far the mean of `draws` independent values in [0, 1] may be from its expectation.

    Hoeffding (1963, theorem 1): it is further than t with a probability of at most 2 exp(-2 draws t^2). For the t of
    this function that is CHANCE / comparisons. So by the union bound one of the comparisons fails with at most CHANCE.
    """
    return math.sqrt(math.log(2 * comparisons / CHANCE) / (2 * draws))


def dropping(vit: VisionTransformer) -> VisionTransformer:
    """The model in training mode."""
    vit.train()
    return vit


def trace(
    vit: VisionTransformer, pixels: jax.Array, rngs: nnx.Rngs | None = None, replace: Trace | None = None
) -> Trace:
    """Returns the values at every site. The values of `replace` take the place of the model's own."""
    seen: Trace = {}

    def tap(site: str, value: jax.Array) -> jax.Array:
        seen[site] = value
        return (replace or {}).get(site, value)

    vit(pixels, tap=tap, rngs=rngs)
    return seen


def multipliers(vit: VisionTransformer, pixels: jax.Array, rngs: nnx.Rngs) -> Trace:
    """Returns the factors of each dropout, 0 or 1 / (1 - rate): (B, N, D), or (B, H, N, N) for attention.

    Taps put ones where a value enters a dropout, and zeros into the stream to which it is added. The probabilities are
    ones, too. They are multiplied by values that are the identity, a feature for each token, and come out as the
    context. `vit` has a cls token of ones and no position embeddings.
    """
    width = CONFIG.hidden_size
    ones, zeros = jnp.ones((BATCH, TOKENS, width)), jnp.zeros((BATCH, TOKENS, width))
    replace = {"patches": ones[:, 1:], "embeddings": zeros}
    for i in (0, 1):
        one_hot = jnp.broadcast_to(jnp.eye(TOKENS, CONFIG.head_dim)[:, None], (BATCH, TOKENS, HEADS, CONFIG.head_dim))
        replace |= {f"block.{i}.attn.value": one_hot, f"block.{i}.attn.probs": jnp.ones((BATCH, HEADS, TOKENS, TOKENS))}
        replace |= {f"block.{i}.{part}.out": ones for part in ("attn", "mlp")}
        replace |= {f"block.{i}.{part}.residual": zeros for part in ("attn", "mlp")}
    # The product with the identity has to be exact on any device.
    with jax.default_matmul_precision("highest"):
        seen = trace(vit, pixels, rngs, replace)
    by_head = {site: seen[site].reshape(BATCH, TOKENS, HEADS, CONFIG.head_dim) for site in ATTENTION}
    return {site: seen[site] for site in HIDDEN} | {
        site: value[..., :TOKENS].swapaxes(1, 2) for site, value in by_head.items()
    }


def over_seeds(observe: Callable[..., Trace], vit: VisionTransformer, pixels: jax.Array, seeds: int) -> Any:
    """Returns `observe(vit, pixels, rngs)` under the seeds 0, 1, ..., stacked along the first axis."""
    graph, state = nnx.split(vit)

    def one(seed: jax.Array) -> Trace:
        return observe(nnx.merge(graph, state), pixels, nnx.Rngs(dropout=jax.random.key(seed)))

    # One after the other, because to compile the draws of all seeds at once takes longer than all of this.
    return jax.device_get(jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(seeds)))


@pytest.fixture(params=[False, True], ids=["independent", "broadcast"])
def config(request: pytest.FixtureRequest) -> ViTConfig:
    return dataclasses.replace(CONFIG, broadcast_attention_dropout=request.param)


@pytest.fixture(scope="module")
def drawn(filled: Filled) -> Callable[[ViTConfig], dict[str, NDArray]]:
    """Returns the `multipliers` of SEEDS seeds by site."""

    @lru_cache
    def draw(config: ViTConfig) -> dict[str, NDArray]:
        vit = dropping(filled(config))
        vit.cls_token[...] = jnp.ones_like(vit.cls_token[...])
        vit.position_embeddings[...] = jnp.zeros_like(vit.position_embeddings[...])
        return over_seeds(multipliers, vit, jnp.asarray(CASE.images()), SEEDS)

    return draw


def test_what_is_kept_is_divided_by_the_probability_of_keeping(config: ViTConfig, drawn) -> None:
    for site, values in drawn(config).items():
        kept = values[values != 0]
        assert 0 < kept.size < values.size
        # Two roundings: of that probability to float32, and of the quotient.
        np.testing.assert_allclose(kept, 1 / (1 - RATES[site]), rtol=2**-23, err_msg=site)


def test_every_element_is_dropped_at_the_configured_rate(config: ViTConfig, drawn) -> None:
    masks = {site: values == 0 for site, values in drawn(config).items()}
    comparisons = sum(1 + mask[0].size for mask in masks.values())
    for site, mask in masks.items():
        if site in ATTENTION and config.broadcast_attention_dropout:
            mask = mask[:, :1, :1]  # the others are copies and no further draws
        # The bound over all elements is at most 0.009. That of one is 0.11, so an element that is never dropped fails.
        assert abs(mask.mean() - RATES[site]) < hoeffding(mask.size, comparisons), site
        assert np.abs(mask.mean(axis=0) - RATES[site]).max() < hoeffding(SEEDS, comparisons), site


@pytest.mark.parametrize(
    ("axes", "axis"),
    [(axes, axis) for axes in (HIDDEN_AXES, ATTENTION_AXES) for axis in axes],
    ids=lambda value: value if isinstance(value, str) else "hidden" if value is HIDDEN_AXES else "attention",
)
def test_masks_are_independent_along_every_axis(axes: tuple[str, ...], axis: str, config: ViTConfig, drawn) -> None:
    """Covers broadcasting, which shares the attention's masks between images and heads, and nothing else."""
    sites, rate = (HIDDEN, RATE) if axes is HIDDEN_AXES else (ATTENTION, ATTENTION_RATE)
    masks = np.stack([drawn(config)[site] == 0 for site in sites])
    shared = config.broadcast_attention_dropout and axes is ATTENTION_AXES
    if shared and axis not in ("batch", "head"):
        masks = masks[:, :, :1, :1]
    if axis == "seed":
        masks = masks[:, :16]  # every pair of these
    flat = np.moveaxis(masks, axes.index(axis), 0).reshape(masks.shape[axes.index(axis)], -1).astype(np.float64)
    agreeing = (flat @ flat.T + (1 - flat) @ (1 - flat).T) / flat.shape[1]
    pairs = agreeing[np.triu_indices(len(flat), k=1)]
    if shared and axis in ("batch", "head"):
        assert (pairs == 1).all()
        return
    # Two independent masks agree where both drop and where both keep.
    expected, bound = rate**2 + (1 - rate) ** 2, hoeffding(flat.shape[1], len(pairs))
    assert expected + bound < 1, "too few draws to tell a pair of masks from one mask twice"
    assert np.abs(pairs - expected).max() < bound


def test_the_mean_over_many_seeds_is_the_value_in_evaluation(config: ViTConfig, filled: Filled) -> None:
    """Feeds each site behind a dropout with the values of evaluation. In float64, so that rounding does not count."""
    with precision_of(np.float64).active():
        vit, pixels = filled(config, dtype=jnp.float64), jnp.asarray(CASE.images(), jnp.float64)
        evaluated = jax.jit(lambda pixels: trace(vit, pixels))(pixels)

        def behind_dropouts(vit: VisionTransformer, pixels: jax.Array, rngs: nnx.Rngs) -> Trace:
            seen = trace(vit, pixels, rngs, replace=evaluated)
            return {site: seen[site] for site in RATES}

        means = {
            site: values.mean(axis=0)
            for site, values in over_seeds(behind_dropouts, dropping(vit), pixels, SEEDS).items()
        }
    evaluated = jax.device_get(evaluated)
    comparisons = sum(mean.size for mean in means.values())
    for site, mean in means.items():
        # A value is a sum of terms, each either 0 or term / (1 - rate). If their widths differ, the root of the sum of
        # their squares replaces the width (Hoeffding's theorem 2).
        block = site.rsplit(".", 1)[0]
        if site in ATTENTION:
            squares = [np.square(evaluated[f"{block}.{part}"]) for part in ("probs", "value")]
            term = np.sqrt(np.einsum("bhqm,bmhk->bqhk", *squares)).reshape(mean.shape)
        else:
            term = np.abs(evaluated["embeddings" if site == "embeddings" else f"{block}.out"])
        bound = hoeffding(SEEDS, comparisons) * term / (1 - RATES[site])
        assert (np.abs(mean - evaluated[site]) < bound).all(), site


def sites_of_the_references_dropouts() -> set[str]:
    """Returns where FlaxViT drops, found by running its submodules in training on their inputs in evaluation.

    The innermost submodules with another result have a dropout.
    """
    reference = FlaxViTReference(CONFIG, CASE.checkpoint().tensors)
    recorded: dict[tuple[str, ...], tuple[Any, Any]] = {}
    differing: set[tuple[str, ...]] = set()

    def observe(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if path not in recorded:  # the first run, in evaluation
            recorded[path] = args, call(*args, **kwargs)
            return recorded[path][1]
        inputs, before = recorded[path]
        output = call(*inputs, **kwargs)
        if any((a != b).any() for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(before), strict=True)):
            differing.add(path)
        return output

    def run(deterministic: bool) -> None:
        rngs = {"dropout": jax.random.key(0)}
        module, params = reference.module(np.float32), {"params": reference.params}
        module.apply(params, CASE.images(), deterministic=deterministic, output_attentions=True, rngs=rngs)

    with precision_of(np.float32).active(), linen.intercept_methods(observe):
        # In post-order an outer module is recorded after the inner ones.
        run(deterministic=True)
        run(deterministic=False)
    innermost = {path for path in differing if not any(other[: len(path)] == path != other for other in differing)}
    named = {("vit", "embeddings", "dropout"): "embeddings"}
    for i in (0, 1):
        layer = ("vit", "encoder", "layer", str(i))
        named[(*layer, "attention", "attention")] = f"block.{i}.attn.context"
        named[(*layer, "attention", "output", "dropout")] = f"block.{i}.attn.residual"
        named[(*layer, "output", "dropout")] = f"block.{i}.mlp.residual"
    return {named.get(path, f"unknown place {path}") for path in innermost}


def test_masks_act_where_the_references_do_and_nowhere_else(config: ViTConfig, filled: Filled) -> None:
    """Feeds each site with the values of evaluation. A changed bit means a dropout right before the site."""
    vit, pixels = filled(config), jnp.asarray(CASE.images())
    evaluated = trace(vit, pixels)
    trained = trace(dropping(vit), pixels, nnx.Rngs(dropout=0), replace=evaluated)
    differing = {site for site, value in trained.items() if (value != evaluated[site]).any()}
    assert differing == sites_of_the_references_dropouts() == set(RATES)


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, tuple[int, ...]]]:
    """Records (probability of keeping, shape) of every mask. The n-th mask of a shape is the same for both models."""
    requests: list[tuple[float, tuple[int, ...]]] = []

    def bernoulli(key: Any, p: float = 0.5, shape: Any = None, **_: Any) -> jax.Array:
        mask = np.random.default_rng(len(requests)).random(shape) < p
        requests.append((p, tuple(shape)))
        return jnp.asarray(mask)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    return requests


def test_with_the_references_masks_training_is_the_references(requested, filled: Filled) -> None:
    """Compares masks: both models draw the same ones in the same order and, given the same ones, are one function."""
    source, pixels = CASE.checkpoint(), CASE.images()
    reference = FlaxViTReference(CONFIG, source.tensors)
    shared = dataclasses.replace(CONFIG, broadcast_attention_dropout=True)
    with precision_of(np.float64).active():
        evaluated, theirs = (
            reference.module(np.float64).apply(
                {"params": reference.params},
                pixels.astype(np.float64),
                deterministic,
                rngs={"dropout": jax.random.key(0)},
            )
            for deterministic in (True, False)
        )
        by_reference = [requested.pop(0) for _ in requested[:]]
        vit = dropping(build(shared, OwnCandidate(shared, source).parameters, dtype=jnp.float64))
        ours = vit(jnp.asarray(pixels, jnp.float64), rngs=nnx.Rngs(dropout=0))
    assert requested == by_reference
    assert len(by_reference) == len(RATES)
    assert error(np.asarray(ours), np.asarray(theirs.logits)).passes_semantic_gate
    assert error(np.asarray(evaluated.logits), np.asarray(theirs.logits)).rms > 0.1


def test_by_default_each_image_and_head_has_its_own_mask(requested, filled: Filled) -> None:
    dropping(filled(CONFIG))(jnp.asarray(CASE.images()), rngs=nnx.Rngs(dropout=0))
    hidden = (1 - RATE, (BATCH, TOKENS, CONFIG.hidden_size))
    block = [(1 - ATTENTION_RATE, (BATCH, HEADS, TOKENS, TOKENS)), hidden, hidden]
    assert requested == [hidden, *block, *block]


def test_one_seed_has_one_result_and_two_seeds_have_two(config: ViTConfig, filled: Filled) -> None:
    vit, pixels = dropping(filled(config)), jnp.asarray(CASE.images())
    logits = [np.asarray(vit(pixels, rngs=nnx.Rngs(dropout=seed))) for seed in range(8)]
    # At least 165 elements a mask: two seeds draw the same with a probability below 10^-30.
    for i, first in enumerate(logits):
        assert all((first != second).any(axis=-1).all() for second in logits[:i])
    np.testing.assert_array_equal(logits[3], vit(pixels, rngs=nnx.Rngs(dropout=3)))
    # A tap makes no difference: the path without a tap does not leave out the attention's dropout.
    np.testing.assert_array_equal(logits[3], trace(vit, pixels, nnx.Rngs(dropout=3))["logits"])
    stream = nnx.Rngs(dropout=3)
    np.testing.assert_array_equal(logits[3], vit(pixels, rngs=stream))
    assert (vit(pixels, rngs=stream) != logits[3]).any()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_evaluation_is_the_same_to_the_last_bit_at_any_rate(rate: float, config: ViTConfig, filled: Filled) -> None:
    pixels = jnp.asarray(CASE.images())
    none = filled(dataclasses.replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    vit = filled(dataclasses.replace(config, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate))
    vit.train()
    assert (vit(pixels, rngs=nnx.Rngs(dropout=0)) != none(pixels)).any()
    vit.eval()
    for rngs in (None, nnx.Rngs(dropout=0)):
        np.testing.assert_array_equal(vit(pixels, rngs=rngs), none(pixels))
        expected = trace(none, pixels)
        for site, value in trace(vit, pixels, rngs).items():
            np.testing.assert_array_equal(value, expected[site], err_msg=site)


def test_training_without_a_rate_is_evaluation(config: ViTConfig, filled: Filled) -> None:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vit, pixels = filled(dataclasses.replace(config, **rates)), jnp.asarray(CASE.images())
    evaluated = vit(pixels)
    np.testing.assert_array_equal(dropping(vit)(pixels), evaluated)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_training_without_a_seed_is_an_error_and_not_evaluation(rate: str, config: ViTConfig, filled: Filled) -> None:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, rate: 0.5}
    with pytest.raises(ValueError, match="no `rngs` argument was provided"):
        dropping(filled(dataclasses.replace(config, **rates)))(jnp.asarray(CASE.images()))


def test_broadcasting_is_no_hugging_face_field() -> None:
    shared = dataclasses.replace(CONFIG, broadcast_attention_dropout=True)
    assert shared != CONFIG  # the two may not share a compiled function
    assert shared.to_hf() == CONFIG.to_hf()
    name = "broadcast_attention_dropout"
    assert name not in shared.to_hf()
    assert not ViTConfig.from_hf({**CONFIG.to_hf(), name: True}).broadcast_attention_dropout
    assert not ViTConfig().broadcast_attention_dropout
    with pytest.raises(ConfigError, match=f"{name} is 1: give true or false"):
        ViTConfig(broadcast_attention_dropout=1)
