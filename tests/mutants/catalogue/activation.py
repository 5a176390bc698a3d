"""Bugs in activations: a function other than the checkpoint's, or another derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from tests.mutants.injection import Inject, at
from tests.mutants.mutant import Mutant, backward, forward
from vit_ref.model import vit


def _computes(act: str) -> Inject:
    """Makes the MLPs compute this activation, whatever the configuration says."""
    return lambda monkeypatch: monkeypatch.setattr(
        vit, "ACTIVATIONS", dict.fromkeys(vit.ACTIVATIONS, vit.ACTIVATIONS[act])
    )


def _instead_of(form: Callable[[jax.Array], jax.Array], *names: str) -> Inject:
    """Makes the activations of these names compute `form`."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:
            monkeypatch.setitem(vit.ACTIVATIONS, name, form)

    return inject


def one_plus_erf(x: jax.Array) -> jax.Array:
    """Returns erf GELU as most frameworks compute it: 1 + erf cancels for values far below zero."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@_gelu.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    return _gelu(*primals), jax.jvp(lambda x: jax.nn.gelu(x, approximate=True), primals, tangents)[1]


def _hidden_clipped(monkeypatch: pytest.MonkeyPatch, dose: float) -> None:
    at("block.*.mlp.hidden", lambda value, here: jnp.maximum(value, -dose))(monkeypatch)


MUTANTS = (
    Mutant(
        number=1,
        name="tanh-gelu",
        story="jax.nn.gelu's own default, the tanh form, for a checkpoint trained with the erf form",
        source="bonsai #111",
        inject=_computes("gelu_new"),
        first_site="block.0.mlp.hidden",
        cause="tanh GELU",
    ),
    Mutant(
        number=2,
        name="quick-gelu",
        story="CLIP's x * sigmoid(1.702 x) for GELU",
        source="timm #2031, open_clip #771",
        inject=_computes("quick_gelu"),
        first_site="block.0.mlp.hidden",
        cause="quick GELU",
    ),
    Mutant(
        number=3,
        name="no-activation",
        story="the MLP has no activation between its two linear layers",
        source="keras-cv #1014",
        inject=at("block.*.mlp.hidden", lambda value, here: here["mlp.fc1"]),
        first_site="block.0.mlp.hidden",
        cause="no activation",
    ),
    Mutant(
        number=44,
        name="hidden-act-ignored",
        story="GELU is written into the model, and the checkpoint's config says ReLU",
        source="HF #25787, jimm",
        inject=_computes("gelu"),
        tests=forward("headless"),
        first_site="block.0.mlp.hidden",
        cause="erf GELU",
    ),
    Mutant(
        name="relu-for-gelu",
        story="the activation of the first Transformer",
        source="Vaswani et al. (2017) has ReLU, and tutorials copy that",
        inject=_computes("relu"),
        first_site="block.0.mlp.hidden",
        cause="ReLU",
    ),
    Mutant(
        name="erf-gelu-for-tanh",
        story="PyTorch's default, the erf form, for a checkpoint trained in JAX with the tanh form",
        source="google-research/vision_transformer uses flax's default",
        inject=_computes("gelu"),
        tests=forward("no-qkv-bias"),
        first_site="block.0.mlp.hidden",
        cause="erf GELU",
    ),
    Mutant(
        name="tanh-gelu-in-block-7",
        story="one block of thirteen was left with the old activation after a search and replace",
        source="one of several edits is forgotten",
        inject=at("block.7.mlp.hidden", lambda value, here: jax.nn.gelu(here["mlp.fc1"], approximate=True)),
        tests=forward("deep"),
        first_site="block.7.mlp.hidden",
        cause="tanh GELU",
    ),
    Mutant(
        name="gelu-with-the-derivative-of-tanh-gelu",
        story="a hand-written kernel with the right values and the other form's derivative",
        source="custom derivatives are written separately from the function",
        inject=at("block.*.mlp.hidden", lambda value, here: _gelu(here["mlp.fc1"])),
        tests=backward("rectangular"),
        first_site="block.1.mlp.fc1",
    ),
    Mutant(
        name="gelu-tail-clipped",
        story="a quantised lookup table replaces GELU's left tail by zero",
        source="tables of int8 inference",
        inject=_hidden_clipped,
        # GELU's smallest value is -0.17, which a clip at 0.1699 just touches.
        doses=(0.1, 0.1699),
        first_site="block.0.mlp.hidden",
    ),
    Mutant(
        name="gelu-by-one-plus-erf",
        story="0.5 x (1 + erf(x / sqrt(2))) cancels below zero: in float32 it errs by percents at -5 and is 0 at -8",
        source="PyTorch, OpenVINO, ONNX Runtime, MLX and Paddle compute it so on CPUs; jax has erfc",
        inject=_instead_of(one_plus_erf, "gelu", "gelu_python"),
        # Parity sees it only if the inputs of the activation lie below -4 or so, see tests/mutants/test_detection.py.
        # The cases' inputs are about 0. So the function is tested alone, and there is no site.
        killed_by="model",
        tests=("tests/model/test_activations.py", "-k", "keeps_its_tail"),
    ),
    Mutant(
        name="tanh-gelu-in-bfloat16",
        story="each step of the tanh form is rounded to the computation's dtype: 1 + tanh errs by 61 % at -3",
        source="jax.nn.gelu, and so flax's default; PyTorch computes in float32 and rounds once",
        inject=_instead_of(functools.partial(jax.nn.gelu, approximate=True), "gelu_new", "gelu_pytorch_tanh"),
        # FlaxViT does this, too, so parity under bfloat16 cannot see it. Float32 and float64 are right.
        killed_by="model",
        tests=("tests/model/test_activations.py", "-k", "rounded_once"),
    ),
)
