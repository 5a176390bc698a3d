"""Bugs in LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array

from tests.mutants.injection import Inject, at, loaded
from tests.mutants.mutant import Mutant, backward, forward
from vit_ref.model import norm, vit
from vit_ref.model.norm import LayerNorm


def _norms(make: Callable[..., Any]) -> Inject:
    """Builds the model with `make` instead of its LayerNorm."""
    return lambda monkeypatch: monkeypatch.setattr(vit, "LayerNorm", make)


def _epsilon(monkeypatch: pytest.MonkeyPatch, dose: float) -> None:
    _norms(lambda width, **options: LayerNorm(width, **{**options, "epsilon": dose}))(monkeypatch)


def _formula(normalise: Callable[[Array, float], Array]) -> Inject:
    """Makes the model's norms normalise with this function. Scale and shift stay the same."""

    class Norm(LayerNorm):
        def __call__(self, x: Array) -> Array:
            x = x if self.dtype is None else x.astype(self.dtype)
            # Broadcast by hand over all axes, for a run with strict promotion.
            scale, bias = (jnp.broadcast_to(each[...].astype(x.dtype), x.shape) for each in (self.scale, self.bias))
            return normalise(x, self.epsilon) * scale + bias

    return _norms(Norm)


def _moments(x: Array) -> tuple[Array, Array]:
    mean = x.mean(-1, keepdims=True)
    return x - mean, jnp.square(x - mean).mean(-1, keepdims=True)


def _epsilon_outside(x: Array, epsilon: float) -> Array:
    centred, variance = _moments(x)
    return centred / (jnp.sqrt(variance) + epsilon)


def _not_centred(x: Array, epsilon: float) -> Array:
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


def _centred_for_the_variance_only(x: Array, epsilon: float) -> Array:
    return x / jnp.sqrt(_moments(x)[1] + epsilon)


def _over_width_less_one(x: Array, epsilon: float) -> Array:
    centred, variance = _moments(x)
    return centred / jnp.sqrt(variance * x.shape[-1] / (x.shape[-1] - 1) + epsilon)


def _difference_of_squares(x: Array, epsilon: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean) + epsilon)


def _detached(x: Array, epsilon: float) -> Array:
    centred, variance = _moments(x)
    return centred / jnp.sqrt(jax.lax.stop_gradient(variance) + epsilon)


def _first_for_second(parameters: dict, config: Any) -> dict:
    return {path: parameters[path.replace("norm2", "norm1")] for path in parameters if "norm2" in path}


def _exchanged(parameters: dict, config: Any) -> dict:
    other = {"norm1": "norm2", "norm2": "norm1"}
    return {
        path: parameters[path.replace(mine, theirs)]
        for path in parameters
        for mine, theirs in other.items()
        if mine in path
    }


MUTANTS = (
    Mutant(
        number=4,
        name="layer-norm-epsilon",
        story="flax's default epsilon, 1e-6, PyTorch's, 1e-5, or nearly the right one",
        source="HF #18137, mindone #225, kornia #2786",
        inject=_epsilon,
        # 1.00001e-12 adds 1e-17 to a variance of 1e-8: an error of 5e-10 on the smallest token.
        doses=(1e-5, 1e-6, 1.00001e-12),
        tests=forward("hard-tokens"),
        first_site="block.0.norm1",
        cause=("LayerNorm epsilon 1e-05", "LayerNorm epsilon 1e-06", "LayerNorm epsilon 1.00001e-12"),
    ),
    Mutant(
        name="layer-norm-epsilon-on-ordinary-tokens",
        story="the same, but every token has a variance of about one",
        source="as above; a float32 check of a ViT-B/16 shows nothing",
        inject=lambda monkeypatch: _epsilon(monkeypatch, 1e-6),
        first_site="block.0.norm1",
        cause="LayerNorm epsilon 1e-06",
    ),
    Mutant(
        number=5,
        name="fast-variance",
        story="E[x^2] - E[x]^2, nnx.LayerNorm's default, which cancels if the mean exceeds the deviation",
        source="the default of nnx.LayerNorm and of penzai",
        inject=_norms(lambda width, **options: nnx.LayerNorm(width, **options, rngs=nnx.Rngs(0))),
        # FlaxViT has this bug, too, so parity cannot measure it. It has no site, because a LayerNorm is tested alone.
        killed_by="model",
        tests=("tests/model/test_model.py", "-k", "layer_norm_survives"),
    ),
    Mutant(
        number=6,
        name="negative-variance",
        story="the same without flax's max(0, ...): rounding makes the variance negative, and its root NaN",
        source="equinox #314",
        inject=_formula(_difference_of_squares),
        # It has no site, because a LayerNorm is tested alone.
        killed_by="model",
        tests=("tests/model/test_model.py", "-k", "layer_norm_survives"),
    ),
    Mutant(
        number=31,
        name="no-final-norm",
        story="the head reads the last block's output",
        source="kornia #2786",
        inject=at("norm", lambda value, here: here.stream),
        first_site="norm",
        cause="LayerNorm left out",
    ),
    Mutant(
        number=32,
        name="norms-exchanged",
        story="layernorm_before and layernorm_after are exchanged in the weight map",
        source="two tensors of one shape",
        inject=loaded(_exchanged),
        first_site="block.0.norm1",
        cause="parameters of block.0.norm2",
    ),
    Mutant(
        number=46,
        name="layer-norm-eps-ignored",
        story="1e-12 is written into the model, and the checkpoint's config says 1e-2",
        source="keras-hub convert_vit",
        inject=lambda monkeypatch: _epsilon(monkeypatch, 1e-12),
        tests=forward("headless"),
        first_site="block.0.norm1",
        cause="LayerNorm epsilon 1e-12",
    ),
    Mutant(
        name="epsilon-outside-the-root",
        story="(x - mean) / (deviation + epsilon)",
        source="Ba et al. (2016) leaves epsilon out; The Annotated Transformer puts it there",
        inject=_formula(_epsilon_outside),
        # At a variance of one the two differ by 5e-13, below the gate. Only faint tokens show the bug.
        tests=forward("hard-tokens"),
        first_site="block.0.norm1",
        cause="epsilon added to the standard deviation",
    ),
    Mutant(
        name="unbiased-variance",
        story="torch.std divides by D - 1",
        source="The Annotated Transformer's LayerNorm",
        inject=_formula(_over_width_less_one),
        first_site="block.0.norm1",
        cause="variance over D - 1",
    ),
    Mutant(
        name="rms-norm",
        story="the mean is not subtracted, as in language models",
        source="Zhang and Sennrich (2019); a block reused from a Llama port",
        inject=_formula(_not_centred),
        first_site="block.0.norm1",
        cause="mean not subtracted",
    ),
    Mutant(
        name="mean-subtracted-for-the-variance-only",
        story="the deviation is right, but it divides the row with its mean",
        source="Keras' LayerNormalization(rms_scaling=True), which is no RMSNorm",
        inject=_formula(_centred_for_the_variance_only),
        first_site="block.0.norm1",
        cause="mean subtracted for the variance only",
    ),
    Mutant(
        name="norm-in-bfloat16",
        story="means and variances are computed in the computation's dtype",
        source="haiku's LayerNorm in bfloat16",
        inject=lambda monkeypatch: monkeypatch.setattr(norm, "at_least_float32", lambda dtype: dtype),
        # The model's token stream is float32 in every precision, so its norms never see bfloat16. A LayerNorm is tested
        # alone, and there is no site.
        killed_by="model",
        tests=("tests/model/test_norm.py", "-k", "rounded_once"),
    ),
    Mutant(
        name="norm-without-scale-and-bias",
        story="the norms keep their initial scale and bias",
        source="flax's names are scale and bias, PyTorch's weight and bias, and a loader that is not strict skips",
        inject=loaded(
            lambda parameters, config: {
                path: value * 0 + path.endswith("scale") for path, value in parameters.items() if "norm" in path
            }
        ),
        first_site="block.0.norm1",
        cause="LayerNorm without scale and bias",
    ),
    Mutant(
        name="one-norm-for-two",
        story="each block uses its first norm twice",
        source="a shared module: in NNX one object is one set of parameters",
        inject=loaded(_first_for_second),
        first_site="block.0.norm2",
        cause="parameters of block.0.norm1",
    ),
    Mutant(
        name="no-gradient-through-the-variance",
        story="the backward pass treats the statistics as constants",
        source="torch's detach() in hand-written norms",
        inject=_formula(_detached),
        tests=backward("rectangular"),
        # The last norm's own gradient is right; the gradient that it passes back is wrong.
        first_site="block.1.mlp.residual",
    ),
)
