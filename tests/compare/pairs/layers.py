"""The layers that the candidates are made of, filled from PyTorch's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray]


def tensors_of(model: torch.nn.Module) -> dict[str, NDArray]:
    """Returns the parameters, and the buffers that no checkpoint has, such as the frequencies of RoPE."""
    named = {**dict(model.named_buffers()), **model.state_dict()}
    return {name: tensor.detach().numpy() for name, tensor in named.items()}


def _given(array: NDArray | None) -> Callable[..., jax.Array]:
    return lambda *_: jnp.asarray(array)


def linear(weight: NDArray, bias: NDArray | None = None) -> nnx.Linear:
    """Returns the layer with PyTorch's weight (out, in)."""
    return nnx.Linear(
        *weight.shape[::-1],
        use_bias=bias is not None,
        kernel_init=_given(weight.T),
        bias_init=_given(bias),
        rngs=nnx.Rngs(0),
    )


def linear_of(tensors: Tensors, name: str) -> nnx.Linear:
    """Returns the layer of that name."""
    return linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def conv_of(tensors: Tensors, name: str) -> nnx.Conv:
    """Returns the convolution that cuts images (B, height, width, C) into patches."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    width, channels, *patch = weight.shape
    return nnx.Conv(
        channels,
        width,
        kernel_size=tuple(patch),
        strides=tuple(patch),
        padding="VALID",
        use_bias=bias is not None,
        kernel_init=_given(weight.transpose(2, 3, 1, 0)),
        bias_init=_given(bias),
        rngs=nnx.Rngs(0),
    )


def norm_of(tensors: Tensors, name: str, epsilon: float) -> nnx.LayerNorm:
    """Returns the LayerNorm of that name."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return nnx.LayerNorm(
        len(weight),
        epsilon=epsilon,
        use_fast_variance=False,
        scale_init=_given(weight),
        bias_init=_given(bias),
        rngs=nnx.Rngs(0),
    )


def rms_norm_of(tensors: Tensors, name: str, epsilon: float) -> nnx.RMSNorm:
    """Returns the RMSNorm of that name."""
    weight = tensors[f"{name}.weight"]
    return nnx.RMSNorm(len(weight), epsilon=epsilon, scale_init=_given(weight), rngs=nnx.Rngs(0))


class Scale(nnx.Module):
    """LayerScale."""

    def __init__(self, tensors: Tensors, name: str):
        self.scale = nnx.Param(jnp.asarray(tensors[f"{name}.lambda1"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale[None, None]


class Attention(nnx.Module):
    """Attention from four layers, to the tokens themselves or to others.

    Keys and values may have fewer heads than queries.

    Args:
      query: and `key`, `value`, `out`: the layers.
      heads: how many the queries have.
      causal: whether a token sees none that comes after it.
      tiled: query head n takes K/V head n modulo their number, which is wrong.
      scaled_by_width: the scores are divided by the root of the whole width, which is wrong.
    """

    def __init__(
        self,
        query: nnx.Linear,
        key: nnx.Linear,
        value: nnx.Linear,
        out: nnx.Linear,
        heads: int,
        *,
        causal: bool = False,
        tiled: bool = False,
        scaled_by_width: bool = False,
    ):
        self.query, self.key, self.value, self.out = query, key, value, out
        self.heads, self.causal, self.tiled = heads, causal, tiled
        self.scale = (query.out_features if scaled_by_width else query.out_features // heads) ** -0.5
        self.groups = query.out_features // key.out_features

    def __call__(
        self,
        x: jax.Array,
        others: jax.Array | None = None,
        rotate: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        head_dim = self.query.out_features // self.heads
        others = x if others is None else others
        query, key, value = (
            layer(tokens).reshape(*tokens.shape[:2], -1, head_dim)
            for layer, tokens in ((self.query, x), (self.key, others), (self.value, others))
        )
        query, key = rotate(query), rotate(key)
        spread_over = (
            partial(jnp.tile, reps=(1, 1, self.groups, 1))
            if self.tiled
            else partial(jnp.repeat, repeats=self.groups, axis=2)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, spread_over(key)) * self.scale
        if self.causal:
            seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
            scores = jnp.where(seen[None, None], scores, -jnp.inf)
        context = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), spread_over(value))
        return self.out(context.reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    """Two layers with an activation between them."""

    def __init__(self, fc1: nnx.Linear, fc2: nnx.Linear, activation: Callable[[jax.Array], jax.Array]):
        self.fc1, self.fc2, self.activation = fc1, fc2, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nnx.Module):
    """Two layers, of which the activation of one gates the other, and a third one."""

    def __init__(
        self, gate: nnx.Linear, up: nnx.Linear, down: nnx.Linear, activation: Callable[[jax.Array], jax.Array]
    ):
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """A block that normalises before attention and before its MLP, with LayerScale or without."""

    def __init__(
        self,
        norm1: nnx.Module,
        attn: Attention,
        norm2: nnx.Module,
        mlp: nnx.Module,
        scales: tuple[Scale, Scale] | tuple[()] = (),
    ):
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.scale1, self.scale2 = scales or (None, None)

    def __call__(self, x: jax.Array, **named: Any) -> jax.Array:
        value = self.attn(self.norm1(x), **named)
        x = x + (value if self.scale1 is None else self.scale1(value))
        value = self.mlp(self.norm2(x))
        return x + (value if self.scale2 is None else self.scale2(value))


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Returns (B, tokens, heads, D) turned by the angles whose cosines and sines (tokens, D) are given."""
    if interleaved:
        turned = jnp.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)
    else:
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate((-second, first), axis=-1)
    return x * cos[None, :, None] + turned * sin[None, :, None]


def spread(angles: jax.Array, *, interleaved: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of angles (tokens, D / 2), each of them twice, as `rotated` takes them."""
    angles = jnp.repeat(angles, 2, axis=-1) if interleaved else jnp.tile(angles, (1, 2))
    return jnp.cos(angles), jnp.sin(angles)


def resized(positions: jax.Array, grid: tuple[int, int], kept: int) -> jax.Array:
    """Returns positions (1, kept + patches, D) for another grid of patches, by PyTorch's bicubic interpolation."""
    side = round((positions.shape[1] - kept) ** 0.5)
    if grid == (side, side):
        return positions
    patches = positions[:, kept:].reshape(1, side, side, -1)
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    patches = jax.image.resize(patches, (1, *grid, patches.shape[-1]), method, antialias=False)
    return jnp.concatenate([positions[:, :kept], patches.reshape(1, grid[0] * grid[1], -1)], axis=1)


def flat_patches(patches: jax.Array) -> jax.Array:
    """Returns patches (B, rows, columns, D) as tokens (B, patches, D)."""
    return patches.reshape(patches.shape[0], -1, patches.shape[-1])


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, NDArray]:
    """Returns the tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def map_channels_last(patches: NDArray) -> NDArray:
    """Selects patches (B, rows, columns, D) as PyTorch's convolution has them."""
    return patches.transpose(0, 3, 1, 2)


def kernel_channels_first(kernel: NDArray) -> NDArray:
    """Selects a convolution's kernel (height, width, in, out) as PyTorch has it."""
    return kernel.transpose(3, 2, 0, 1)


def repeated(token: nnx.Param, batch: int) -> jax.Array:
    """Returns tokens (1, N, D) for each image of a batch."""
    return jnp.repeat(token[...], batch, axis=0)


gelu = partial(jax.nn.gelu, approximate=False)
tanh_gelu = partial(jax.nn.gelu, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns what CLIP computes in place of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)
