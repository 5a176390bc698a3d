"""Which way attention takes where nobody asks for its probabilities, and that cuDNN's is given what it must see."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from vit_ref import attention
from vit_ref.verify.gates import error

pytestmark = pytest.mark.model

# An odd number of tokens, as a class token makes it.
TOKENS = 37
PADDED = 40


def qkv(dtype: Any, width: int = 16) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, TOKENS, 3, width)), dtype) for _ in range(3))
    return query, key, value


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """cuDNN is there, and XLA does its part of the work; the implementations that were asked for."""
    asked: list[str | None] = []
    own = jax.nn.dot_product_attention

    def attention_of(*arguments: Array, implementation: str | None = None, **options: Any) -> Array:
        asked.append(implementation)
        return own(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention_of)
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    # XLA's way relies on what the suite forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield asked


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "fused"),
    [
        ("cuda", jnp.bfloat16, 16, True),
        ("cuda", jnp.float16, 128, True),
        ("cuda", jnp.float32, 16, False),
        ("cuda", jnp.bfloat16, 12, False),
        ("cuda", jnp.bfloat16, 136, False),
        # On the machine that has cuDNN, for its processor.
        ("cpu", jnp.bfloat16, 16, False),
    ],
)
def test_cudnn_is_taken_where_it_can(
    platform: str, dtype: Any, width: int, fused: bool, cudnn: list[str | None]
) -> None:
    traced = jax.jit(attention.attend).trace(*qkv(dtype, width))
    # Its tokens are padded; no other way has so many.
    assert (f"{PADDED}x" in traced.lower(lowering_platforms=(platform,)).as_text()) == fused
    assert set(cudnn) <= {"cudnn"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_sees_every_token_and_no_padding(dtype: Any, cudnn: list[str | None]) -> None:
    def outputs(attend: Any) -> list[Array]:
        def weighted(*operands: Array) -> tuple[Array, Array]:
            context = attend(*operands)
            # Another weight for each, so that no gradient is zero.
            weights = jnp.arange(context.size, dtype=jnp.float32).reshape(context.shape) % 7
            return (context.astype(jnp.float32) * weights).sum(), context

        gradients, context = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(*qkv(dtype))
        return [context, *gradients]

    for found, expected in zip(outputs(attention._fused), outputs(attention.weigh), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        off = error(np.asarray(found), np.asarray(expected, np.float64)).rms
        # One rounding, where the two sum in another order; a row of padding that is seen makes 1e-2 and more of it.
        assert off <= float(jnp.finfo(dtype).eps), f"{off:.1e}"
    assert cudnn == ["cudnn"]


@pytest.mark.parametrize("beside", [False, True], ids=["no cuDNN", "cuDNN for another device"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_cpu_forms_the_probabilities_in_half_precision(
    dtype: Any, beside: bool, request: pytest.FixtureRequest
) -> None:
    if beside:
        request.getfixturevalue("cudnn")
    operands = qkv(dtype)
    np.testing.assert_array_equal(attention.attend(*operands), attention.weigh(*operands))


@pytest.mark.parametrize(
    ("version", "capability", "there"),
    [("cuda 13000", "9.0", True), ("cuda 12080", "7.5", False), ("rocm 60300", "gfx942", False), ("cpu", None, False)],
)
def test_cudnn_is_found_by_the_device(
    version: str, capability: str | None, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(client=SimpleNamespace(platform_version=version), compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention._has_cudnn() == there
