"""Do all forms of attention compute the same, and does a model use the one that it is given?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

import vit_ref
from tests.helpers.jaxprs import equations
from vit_ref.errors import InputError
from vit_ref.model import attention
from vit_ref.model.attention import Attend
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES
from vit_ref.verify.gates import error

# An odd number of tokens, which a cls token makes.
TOKENS = 37


def qkv(dtype: Any) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, TOKENS, 3, 16)), dtype) for _ in range(3))
    return query, key, value


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Array]]:
    """Lets XLA do cuDNN's part of the work, and returns the lengths that it was given."""
    told: list[Array] = []
    own = jax.nn.dot_product_attention

    def by_xla(*operands: Array, implementation: str, **lengths: Array) -> Array:
        assert implementation == "cudnn"
        # The number of tokens has to be even, and a row has to fill whole 16 bytes.
        assert not {operand.shape[1] for operand in operands} - {24, 40}
        assert len({id(each) for each in lengths.values()}) == 1 and len(lengths) == 2
        told.append(lengths["key_value_seq_lengths"])
        return own(*operands, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(attention, "_capability", lambda: 8.0)
    # XLA's implementation needs the implicit promotion that the suite forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield told


def outputs(attend: Attend, dtype: Any) -> list[Array]:
    """Returns the context and its gradients."""

    def weighted(*operands: Array) -> tuple[Array, Array]:
        context = attend(*operands)
        # Different weights, so that no gradient is zero.
        weights = jnp.arange(context.size, dtype=jnp.float32).reshape(context.shape) % 7
        return (context.astype(jnp.float32) * weights).sum(), context

    gradients, context = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(*qkv(dtype))
    return [context, *gradients]


def require_same(attend: Attend, dtype: Any, units: int = 1) -> None:
    for found, expected in zip(outputs(attend, dtype), outputs(attention.weigh, dtype), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        off = error(np.asarray(found), np.asarray(expected, np.float64)).rms
        # One rounding, because the two sum in another order. A padding row that is attended to makes 1e-2 and more.
        assert off <= units * float(jnp.finfo(dtype).eps), f"{off:.1e}"


ON_GPU = pytest.mark.skipif(attention._capability() < 8, reason="needs an NVIDIA GPU, Ampere or later")
HALF = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


@HALF
def test_cudnn_sees_every_token_and_no_padding(dtype: Any, lengths: list[Array]) -> None:
    require_same(attention.cudnn, dtype)
    np.testing.assert_array_equal(lengths[0], [TOKENS, TOKENS])


@ON_GPU
@HALF
def test_cudnn_itself_finds_the_same(dtype: Any) -> None:
    """Allows two units, because its backward pass rounds the probabilities that it computes again."""
    require_same(attention.cudnn, dtype, units=2)


def off_with_cudnn(told: list[Array], times: int = 1) -> tuple[float, list[int]]:
    """Returns how far a model's loss and gradients with cuDNN are from those with `weigh`, on images of that width.

    And it returns the lengths that cuDNN was given, of which `told` holds the tracers.
    """
    case, found, lengths = CASES["rectangular"], [], []
    # With this epsilon a normalised row of zeros is 0 * inf.
    config = dataclasses.replace(case.config, hidden_size=48, num_attention_heads=3, layer_norm_eps=1e-38)
    config = dataclasses.replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pixels = jnp.tile(jnp.asarray(case.images()), (1, 1, times, 1))
    for attend in (attention.cudnn, attention.weigh):
        model = VisionTransformer(config, dtype=jnp.bfloat16, attention=attend, rngs=nnx.Rngs(0))

        model.train()

        def loss(model: VisionTransformer) -> tuple[Array, list[Array]]:
            told.clear()
            variance = model(pixels, interpolate_pos_encoding=times > 1).astype(jnp.float32).var()
            return variance, list(told)

        (value, seen), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
        lengths += [int(each[0]) for each in seen]
        # Query and key together, because a key's bias has no gradient but rounding.
        found.append(np.concatenate([np.ravel(each) for each in (value, *jax.tree.leaves(gradients))]))
    return error(found[0], found[1].astype(np.float64)).rms, lengths


@pytest.mark.parametrize(("times", "tokens"), [(1, 17), (2, 33)])
def test_a_model_pads_for_cudnn_once_and_no_token_sees_it(times: int, tokens: int, lengths: list[Array]) -> None:
    off, given = off_with_cudnn(lengths, times)
    # One rounding, because the two sum in another order. Padding rows that are attended to make a half.
    assert off <= float(jnp.finfo(jnp.bfloat16).eps)
    assert given == [tokens] * CASES["rectangular"].config.num_hidden_layers


def test_a_model_that_pads_leaves_nothing_to_pad_to_its_blocks(
    lengths: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, pad = [], jnp.pad
    monkeypatch.setattr(jnp, "pad", lambda x, width: (widths.append(np.sum(width)), pad(x, width))[1])
    off_with_cudnn(lengths)
    assert widths and not np.any(widths)


@ON_GPU
def test_a_model_with_cudnn_itself_finds_the_same() -> None:
    assert off_with_cudnn([])[0] <= 2 * float(jnp.finfo(jnp.bfloat16).eps)


@HALF
def test_padding_has_no_context_and_no_gradient(dtype: Any, lengths: list[Array]) -> None:
    padded = [jnp.concatenate([x, x[:, :3]], axis=1) for x in qkv(dtype)]
    context, back = jax.vjp(lambda *operands: attention.cudnn(*operands, tokens=TOKENS), *padded)
    alone, back_alone = jax.vjp(attention.cudnn, *qkv(dtype))
    for found, expected in zip((context, *back(context)), (alone, *back_alone(alone)), strict=True):
        assert not found[:, TOKENS:].any()
        np.testing.assert_array_equal(found[:, :TOKENS], expected)


def test_a_model_that_shows_or_drops_probabilities_does_not_pad(lengths: list[Array]) -> None:
    config = dataclasses.replace(CASES["rectangular"].config, attention_probs_dropout_prob=0.5)
    model = VisionTransformer(config, dtype=jnp.bfloat16, attention=attention.cudnn, rngs=nnx.Rngs(0))
    pixels, rows = jnp.asarray(CASES["rectangular"].images()), set()
    model(pixels, tap=lambda site, value: (rows.add(value.shape[1]) if "residual" in site else None, value)[1])
    assert rows == {17} and not lengths
    model.train()
    assert jnp.isfinite(model(pixels, rngs=nnx.Rngs(dropout=0))).all() and not lengths


def test_a_block_with_dropout_leaves_cudnn_to_the_others(lengths: list[Array], monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[int] = []
    weigh = attention.weigh
    monkeypatch.setattr(
        "vit_ref.model.vit.weigh", lambda query, *others: (weighed.append(query.shape[1]), weigh(query, *others))[1]
    )
    config = dataclasses.replace(
        CASES["rectangular"].config, hidden_size=48, num_attention_heads=3, attention_probs_dropout_prob=0.5
    )
    model = VisionTransformer(config, dtype=jnp.bfloat16, attention=attention.cudnn, rngs=nnx.Rngs(0))
    pixels = jnp.asarray(CASES["rectangular"].images())
    for i in range(2):
        model.eval()
        model.blocks[i].attn.train()
        model(pixels, rngs=nnx.Rngs(dropout=0))
        assert weighed == [int(each[0]) for each in lengths] == [17] * (i + 1)


def test_cudnns_lengths_have_the_batch_that_the_images_have(lengths: list[Array]) -> None:
    """Batches lengths, because otherwise jax cannot batch attention again, as for one gradient an image."""
    many = [operand[:, None] for operand in qkv(jnp.bfloat16)]
    jax.make_jaxpr(jax.vmap(attention.cudnn))(*many)
    assert lengths[0].shape == (1,)
    assert "BatchTracer" in type(lengths[0]).__name__


def test_cudnn_is_for_half_precision() -> None:
    with pytest.raises(InputError, match=r"^cuDNN's attention takes half precision, and this is float32: give"):
        attention.cudnn(*qkv(jnp.float32))


def test_without_an_nvidia_gpu_cudnn_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_capability", lambda: 0.0)
    with pytest.raises(
        InputError,
        match=r"^jax's device is .+, and cuDNN's attention needs an NVIDIA GPU, Ampere or later: leave",
    ):
        attention.cudnn(*qkv(jnp.bfloat16))


@pytest.mark.parametrize(("capability", "widest"), [(8.0, 128), (8.9, 128), (9.0, 256), (12.0, 256)])
def test_heads_too_wide_for_cudnn_are_refused_in_one_line(
    capability: float, widest: int, lengths: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    attention.require_heads(8)
    attention.require_heads(widest)
    for width in (widest - 4, widest + 8):
        operands = [jnp.zeros((1, 2, 1, width), jnp.bfloat16)] * 3
        said = (
            rf"^the model's heads are {width} wide, and cuDNN's attention takes a multiple of 8, here at most {widest}:"
        )
        with pytest.raises(InputError, match=said):
            attention.cudnn(*operands)
    assert not lengths


@pytest.mark.parametrize(
    ("version", "capability", "there"),
    [("cuda 13000", "9.0", True), ("cuda 13000", "8.0", True), ("cuda 13000", "7.5", False), ("cpu", "", False)],
)
def test_cudnns_attention_is_there_on_ampere_and_later(
    version: str, capability: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(client=client, compute_capability=capability, device_kind="some")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with (
        nullcontext() if there else pytest.raises(InputError, match="jax's device is some, and cuDNN's attention needs")
    ):
        attention.require_cudnn()


@HALF
def test_models_form_the_probabilities_in_half_precision(dtype: Any) -> None:
    operands = qkv(dtype)
    np.testing.assert_array_equal(attention.attend(*operands), attention.weigh(*operands))


def test_in_float32_the_context_is_divided_and_no_probability() -> None:
    traced = jax.make_jaxpr(attention.attend)(*qkv(jnp.float32)).jaxpr
    quotients = [each.outvars[0].aval.shape for each in equations(traced) if each.primitive.name == "div"]
    assert quotients == [(2, 3, TOKENS, 16)]


def test_scores_that_no_exponential_holds_are_weighed_too() -> None:
    query, key, value = qkv(jnp.float32)
    # The largest score is some thousands, and exp overflows from 89 on.
    found, expected = (each(64 * query, 64 * key, value) for each in (attention.attend, attention.weigh))
    # Attention is one-hot except for a few queries, so products and sums are exact except for those.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2**-23 * float(jnp.abs(value).max()))


def test_a_model_takes_the_attention_that_it_is_given(tmp_path: Path) -> None:
    case = CASES["rectangular"]
    calls = []

    def uniform(query: Array, key: Array, value: Array) -> Array:
        calls.append(query.shape)
        return jnp.broadcast_to(value.mean(axis=1, keepdims=True), value.shape)

    model = VisionTransformer(case.config, attention=uniform, rngs=nnx.Rngs(0))
    vit_ref.save_pretrained(model, tmp_path)
    loaded, pixels = vit_ref.from_pretrained(tmp_path, attention=uniform), jnp.asarray(case.images())
    np.testing.assert_array_equal(loaded(pixels), model(pixels))
    assert len(calls) == 2 * case.config.num_hidden_layers
    # A tap that reads probabilities gets some.
    seen = []
    loaded(pixels, tap=lambda site, value: (seen.append(site), value)[1])
    assert "block.0.attn.probs" in seen and len(calls) == 2 * case.config.num_hidden_layers
