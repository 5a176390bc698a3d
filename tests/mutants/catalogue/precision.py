"""Bugs of dtypes and of compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.mutants.injection import Inject, Pass, at, instead
from tests.mutants.mutant import Mutant, backward, forward
from vit_ref.finetune import step
from vit_ref.model import attention
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.own import OwnCandidate


def _rounded(dtype: Any) -> Callable[[Array, Pass], Array]:
    """Rounds to `dtype` and back, if the computation is in float32."""
    return lambda value, here: value.astype(dtype) if value.dtype == jnp.float32 else value


def _rounded_operands(subscripts: str, *operands: Array, **options: Any) -> Array:
    narrow = [x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 else x for x in operands]
    return jnp.einsum(subscripts, *narrow, **options)


def _narrow(subscripts: str, *operands: Array, preferred_element_type: Any = None) -> Array:
    return jnp.einsum(subscripts, *operands)


@jax.custom_vjp
def _backward_in_bfloat16(x: Array) -> Array:
    return x


_backward_in_bfloat16.defvjp(
    lambda x: (x, None), lambda _, cotangent: (cotangent.astype(jnp.bfloat16).astype(cotangent.dtype),)
)


def _truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = OwnCandidate.trace

    def narrow(self: OwnCandidate, *arguments: Any, **options: Any) -> dict:
        return {site: value.astype(np.float32) for site, value in trace(self, *arguments, **options).items()}

    monkeypatch.setattr(OwnCandidate, "trace", narrow)


def _traced(under: bool) -> Inject:
    """Adds an error of a hundredth, only under jit or only without it."""

    def change(value: Array, here: Pass) -> Array:
        return value * 1.01 if isinstance(value, jax.core.Tracer) == under else value

    return at("block.0.mlp.out", change)


def _keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Array] = []

    def keep(value: Array, here: Pass) -> Array:
        kept.append(value)
        return value

    at("block.0.attn.probs", keep)(monkeypatch)


def _never_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ViTConfig, "__eq__", lambda one, other: one is other)
    monkeypatch.setattr(ViTConfig, "__hash__", object.__hash__)


def _printed(value: Array, here: Pass) -> Array:
    jax.debug.callback(lambda x: None, value)
    return value


MUTANTS = (
    Mutant(
        number=37,
        name="softmax-in-bfloat16",
        story="scores and their softmax have the computation's dtype",
        source="axlearn #18",
        inject=lambda monkeypatch: instead(monkeypatch, attention, "jnp.einsum", _narrow),
        killed_by="model",
        # FlaxViT does this, too, so parity cannot see it under bfloat16: the right model and this one err about as
        # much. Float32 and float64 are right. So a separate test looks at one site.
        tests=("tests/model/test_model.py", "-k", "softmax"),
        first_site="block.0.attn.probs",
        says="{site} is",
    ),
    Mutant(
        number=38,
        name="loss-in-bfloat16",
        story="the cross-entropy of bfloat16 logits is computed in bfloat16",
        source="optax #1020",
        inject=lambda monkeypatch: instead(monkeypatch, step, "jnp.float32", jnp.bfloat16),
        killed_by="training",
        # The loss comes after the last site, where parity ends.
        tests=("tests/training/test_overfit.py", "-k", "loss_is_float32"),
    ),
    Mutant(
        number=39,
        name="backward-in-bfloat16",
        story="the forward pass has full precision, the gradient of the logits bfloat16",
        source="marin #8217",
        inject=at("logits", lambda value, here: _backward_in_bfloat16(value)),
        tests=backward("rectangular"),
        first_site="norm",
    ),
    Mutant(
        number=40,
        name="x64-off",
        story="float64 values are float32",
        source="jax's gotchas: without jax_enable_x64 this happens silently",
        inject=_truncated,
        # The first site in alphabetical order, in which jax returns a dictionary.
        first_site="block.0.attn.context",
        says="sites do not, first {site}: float32",
    ),
    Mutant(
        name="bfloat16-in-float32-alone",
        story="one value is rounded to bfloat16, only in a float32 computation",
        source="autocast: the float64 check never sees it",
        inject=at("block.1.attn.context", _rounded(jnp.bfloat16)),
        tests=forward("rectangular"),
        first_site="block.1.attn.context",
        cause="rounded to bfloat16",
    ),
    Mutant(
        name="float16-in-float32-alone",
        story="the same with float16",
        source="autocast: the float64 check never sees it",
        inject=at("block.1.mlp.hidden", _rounded(jnp.float16)),
        tests=forward("rectangular"),
        first_site="block.1.mlp.hidden",
        cause="rounded to float16",
    ),
    Mutant(
        name="softmax-in-float32-under-float64",
        story="one value of a float64 computation is rounded to float32",
        source="jax.nn.dot_product_attention always takes its softmax in float32",
        inject=at("block.*.attn.probs", lambda value, here: value.astype(jnp.float32)),
        first_site="block.0.attn.probs",
        cause="rounded to float32",
    ),
    Mutant(
        name="matmul-of-rounded-operands",
        story="operands of the products of queries and keys have eight bits, as in matrix units by default",
        source="jax_default_matmul_precision on TPU, TF32 on GPU",
        inject=lambda monkeypatch: instead(monkeypatch, attention, "jnp.einsum", _rounded_operands),
        first_site="block.0.attn.probs",
        cause="inputs of the scores rounded to bfloat16",
    ),
    Mutant(
        name="wrong-under-jit-alone",
        story="a branch on whether a value is concrete",
        source="isinstance(x, jax.core.Tracer), and numpy otherwise",
        inject=_traced(under=True),
        compiled=True,
        first_site="block.0.mlp.out",
        cause="1.01 x the reference",
    ),
    Mutant(
        name="wrong-without-jit-alone",
        story="the opposite branch: parity, which compiles, cannot see it",
        source="isinstance(x, jax.core.Tracer), and numpy otherwise",
        inject=_traced(under=False),
        compiled=True,
        killed_by="consistency",
        # Two ways of running are compared at their logits.
        tests=("tests/consistency/test_ways.py", "-k", "VariantsTest and float32"),
    ),
    Mutant(
        name="traced-anew-for-every-checkpoint",
        story="equal configurations compare as different, so compiled code is not used again",
        source="a static argument compared by identity or with its labels",
        inject=_never_equal,
        killed_by="consistency",
        # No value is wrong.
        tests=("tests/consistency/test_ways.py", "-k", "do_not_trace_again and nnx-jit"),
    ),
    Mutant(
        name="a-tracer-is-kept",
        story="attention maps are kept in a list, also under jit",
        source="jax's gotchas; UnexpectedTracerError months later",
        inject=_keeping,
        killed_by="consistency",
        # No value is wrong.
        tests=("tests/consistency/test_tracing.py", "-k", "no_tracer_outlives and evaluation"),
    ),
    Mutant(
        name="a-callback-is-left-in",
        story="a debug print calls the host in every step",
        source="jax.debug.print",
        inject=at("block.0.mlp.out", _printed),
        killed_by="consistency",
        # No value is wrong.
        tests=("tests/consistency/test_tracing.py", "-k", "calls_nothing_on_the_host and evaluation"),
    ),
)
