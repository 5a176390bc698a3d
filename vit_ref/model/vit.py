"""The Vision Transformer of Dosovitskiy et al. (2021, https://arxiv.org/abs/2010.11929) in Flax NNX.

It computes what Hugging Face's `ViTForImageClassification` and `ViTModel` compute. Images are NHWC. The model passes
each value at a site to a tap, a function `(site, value) -> value`. So recording, replacing and perturbing values need
neither hooks nor a second forward pass. `vit_ref.model.sites` lists the sites.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from vit_ref.errors import InputError
from vit_ref.model.activations import ACTIVATIONS
from vit_ref.model.attention import Attend, at_least_float32, attend, cudnn, padding, weigh
from vit_ref.model.config import ViTConfig
from vit_ref.model.norm import LayerNorm

Tap = Callable[[str, Array], Array]


def identity(site: str, value: Array) -> Array:
    """Returns the value. With this tap, attention may take a path that never forms the probabilities."""
    return value


def _materialised(x: Array) -> Array:
    """Returns x, computed once, and makes its cotangent computed once.

    Without it XLA fuses what is cheap into each reader again. The cotangent of a token stream is a sum over branches.
    All readers in all blocks below would sum it again, which takes long to compile and to run.

    On CPUs XLA drops the barrier, but does not fuse the division. On GPUs it is the other way round. The division is by
    a one that XLA cannot see through, so it is exact.
    """
    return jax.lax.optimization_barrier(x) / jax.lax.optimization_barrier(jnp.ones((), x.dtype))


def _scoped(tap: Tap, scope: str) -> Tap:
    return tap if tap is identity else lambda site, value: tap(f"{scope}.{site}", value)


class Attention(nnx.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D); `ViTSelfAttention` and the dense layer after it."""

    def __init__(self, config: ViTConfig, linear: Callable[..., nnx.Linear], attention: Attend | None, rngs: nnx.Rngs):
        width = config.hidden_size
        self.query = linear(width, width, use_bias=config.qkv_bias, rngs=rngs)
        self.key = linear(width, width, use_bias=config.qkv_bias, rngs=rngs)
        self.value = linear(width, width, use_bias=config.qkv_bias, rngs=rngs)
        self.out = linear(width, width, rngs=rngs)
        # Axes of (B, H, N, N) that share a mask: images and heads, or none.
        shared = (0, 1) if config.broadcast_attention_dropout else ()
        self.dropout = nnx.Dropout(config.attention_probs_dropout_prob, broadcast_dims=shared, deterministic=True)
        self.heads = config.num_attention_heads
        self.attend = attention or attend

    def weighs(self, tap: Tap) -> bool:
        """Tells whether a tap or active dropout needs the probabilities, and so `weigh` and not `attend`."""
        return tap is not identity or (self.dropout.rate > 0 and not self.dropout.deterministic)

    def __call__(self, x: Array, tap: Tap, rngs: nnx.Rngs | None, real: int | None = None) -> Array:
        """Attends from every token to every token.

        Args:
          x: the tokens (B, N, D).
          tap: the tap for the sites of `attn`.
          rngs: the "dropout" stream, needed if dropout is active.
          real: number of the N rows that are tokens; the others are padding. None for all. Only with `cudnn`, and if
            nothing needs the probabilities.

        Returns:
          (B, N, D).
        """
        batch, tokens, width = x.shape
        heads = (batch, tokens, self.heads, width // self.heads)
        query = tap("query", self.query(x).reshape(heads))
        key = tap("key", self.key(x).reshape(heads))
        value = tap("value", self.value(x).reshape(heads))
        if not self.weighs(tap):
            attend = self.attend if real is None else partial(cudnn, tokens=real)
            context = attend(query, key, value)
        else:
            context = weigh(query, key, value, lambda probs: self.dropout(tap("probs", probs), rngs=rngs))
        context = tap("context", context.reshape(batch, tokens, width))
        return tap("out", self.out(context))


class MLP(nnx.Module):
    """Two linears around an activation, (B, N, D) -> (B, N, D); `ViTIntermediate` and `ViTOutput`'s dense layer."""

    def __init__(self, config: ViTConfig, linear: Callable[..., nnx.Linear], rngs: nnx.Rngs):
        self.fc1 = linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Array, tap: Tap) -> Array:
        """Transforms each token. `tap` is for the sites of `mlp`."""
        hidden = ACTIVATIONS[self.activation](tap("fc1", self.fc1(x)))
        return tap("out", self.fc2(tap("hidden", hidden)))


class Block(nnx.Module):
    """One pre-norm encoder block, (B, N, D) -> (B, N, D); `ViTLayer`."""

    def __init__(
        self,
        config: ViTConfig,
        linear: Callable[..., nnx.Linear],
        norm: Callable[[], LayerNorm],
        attention: Attend | None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = norm()
        self.attn = Attention(config, linear, attention, rngs)
        self.norm2 = norm()
        self.mlp = MLP(config, linear, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob, deterministic=True)

    def __call__(self, x: Array, tap: Tap, rngs: nnx.Rngs | None, real: int | None = None) -> Array:
        """Adds attention, then the MLP, to the stream (B, N, D). `Attention` explains the arguments."""
        # Without a backward pass the barriers cost time and save nothing.
        stream = (lambda x: x) if self.dropout.deterministic else _materialised
        x = stream(x)
        attended = self.attn(tap("norm1", self.norm1(x)), _scoped(tap, "attn"), rngs, real)
        x = stream(tap("attn.residual", x + self.dropout(attended, rngs=rngs).astype(x.dtype)))
        transformed = self.mlp(tap("norm2", self.norm2(x)), _scoped(tap, "mlp"))
        return tap("mlp.residual", x + self.dropout(transformed, rngs=rngs).astype(x.dtype))


class VisionTransformer(nnx.Module):
    """Vision Transformer with or without a classification head.

    It starts in evaluation mode. `model.train()` turns dropout on, `model.eval()` turns it off.

    Args:
      config: the configuration.
      dtype: dtype of the computation; None to promote from pixels and parameters as flax does. With a dtype, the token
        stream and its LayerNorms are in at least float32. The softmax always is.
      param_dtype: dtype of the newly initialised parameters.
      attention: replaces `attention.attend`, if neither a tap nor dropout needs the probabilities.
      rngs: the "params" stream initialises the parameters. No other stream is used.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        attention: Attend | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        # The reference truncates its normal at an absolute +-2, which cuts nothing at any usual deviation.
        init = nnx.initializers.normal(config.initializer_range)
        linear = partial(nnx.Linear, kernel_init=init, dtype=dtype, param_dtype=param_dtype)
        # A stream in bfloat16 would be rounded twice a block. FlaxViT keeps its stream in float32, too.
        wide = None if dtype is None else at_least_float32(dtype)
        norm = partial(
            LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, dtype=wide, param_dtype=param_dtype
        )
        self.stream_dtype = wide
        self.patch = nnx.Conv(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_hw,
            strides=config.patch_hw,
            padding="VALID",
            kernel_init=init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        rows, columns = config.grid()
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.hidden_size), param_dtype))
        self.position_embeddings = nnx.Param(
            init(rngs.params(), (1, rows * columns + 1, config.hidden_size), param_dtype)
        )
        self.dropout = nnx.Dropout(config.hidden_dropout_prob, deterministic=True)
        self.blocks = nnx.List([Block(config, linear, norm, attention, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = norm()
        if config.pooler:
            self.pooler = linear(config.hidden_size, config.pooler_width, rngs=rngs)
        if config.num_labels:
            self.head = linear(config.hidden_size, config.num_labels, rngs=rngs)

    def __call__(
        self,
        pixels: Array,
        *,
        tap: Tap = identity,
        interpolate_pos_encoding: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """Classifies images, or embeds them if the model has no head.

        Args:
          pixels: preprocessed images (B, height, width, C).
          tap: function called with the name and value of every site. Its result takes the place of the value.
          interpolate_pos_encoding: whether to accept any size that is a multiple of the patch, and to resize the
            position embeddings to it.
          rngs: the "dropout" stream, needed in training mode if a dropout rate is above zero.

        Returns:
          Logits (B, num_labels). Without a head, the pooler's output (B, pooler_output_size), or without a pooler the
          normalised cls token (B, D).

        Raises:
          InputError: the images have another rank, size or number of channels than the configuration.
        """
        config = self.config
        self._check(pixels, interpolate_pos_encoding)
        height, width = pixels.shape[1:3]
        patches = self.patch(pixels)
        patches = tap("patches", patches.reshape(len(pixels), -1, config.hidden_size))
        parameters = self.cls_token[...], self.position_embeddings[...]
        # Promote before the resize, because the resize would round in the stored dtype, such as bfloat16.
        patches, cls_token, positions = promote_dtype((patches, *parameters), dtype=self.stream_dtype)
        positions = resize_positions(positions, config.grid(), config.grid((height, width)))
        tokens = jnp.concatenate([jnp.broadcast_to(cls_token, (len(pixels), 1, config.hidden_size)), patches], axis=1)
        x = tap("embeddings", self.dropout(tokens + positions, rngs=rngs))
        real = None
        if all(block.attn.attend is cudnn and not block.attn.weighs(tap) for block in self.blocks):
            # Pad once here, and not in the attention of each block. The last token serves as padding because it is
            # finite. No token attends to it, and it gets no gradient.
            real = x.shape[1]
            last = jax.lax.stop_gradient(x[:, -1:])
            x = jnp.concatenate([x, jnp.repeat(last, padding(real), axis=1)], axis=1)
        for i, block in enumerate(self.blocks):
            x = block(x, _scoped(tap, f"block.{i}"), rngs, real)
        cls = tap("norm", self.norm(x))[:, 0]
        if config.pooler:
            return tap("pooler", ACTIVATIONS[config.pooler_act](self.pooler(cls)))
        return tap("logits", self.head(cls)) if config.num_labels else tap("cls", cls)

    def _check(self, pixels: Array, interpolate_pos_encoding: bool) -> None:
        config = self.config
        if pixels.ndim != 4:
            raise InputError(f"pixels have shape {pixels.shape}: give a batch of images (B, height, width, channels)")
        *image_hw, channels = pixels.shape[1:]
        if channels != config.num_channels:
            hint = (
                "; they look channels-first: transpose them to NHWC" if pixels.shape[1] == config.num_channels else ""
            )
            raise InputError(f"pixels have {channels} channels: give {config.num_channels}, as the model takes{hint}")
        if image_hw[0] % config.patch_hw[0] or image_hw[1] % config.patch_hw[1] or 0 in image_hw:
            raise InputError(
                f"images have {image_hw} pixels, not a multiple of the patch {list(config.patch_hw)}: resize them"
            )
        if tuple(image_hw) != config.image_hw and not interpolate_pos_encoding:
            raise InputError(
                f"images have {image_hw} pixels, and the model takes {list(config.image_hw)}: resize them, or pass"
                " interpolate_pos_encoding=True"
            )


def resize_positions(positions: Array, grid: tuple[int, int], target: tuple[int, int]) -> Array:
    """Resizes position embeddings to another grid of patches; `ViTEmbeddings.interpolate_pos_encoding`.

    It is PyTorch's bicubic resize: kernel parameter a = -0.75 (that of jax's "cubic" is -0.5), align_corners false, no
    antialiasing.

    Args:
      positions: (1, 1 + rows * columns, D), with the cls token's first.
      grid: (rows, columns) of `positions`.
      target: (rows, columns) of the result.

    Returns:
      (1, 1 + rows * columns, D) for `target`, or `positions` itself if the grid is the same.
    """
    if target == grid:
        return positions
    width = positions.shape[-1]
    patches = positions[:, 1:].reshape(1, *grid, width)
    method = jax.image.ResizeMethod.CUBIC_PYTORCH
    resized = jax.image.resize(patches, (1, *target, width), method, antialias=False)
    return jnp.concatenate([positions[:, :1], resized.reshape(1, -1, width)], axis=1)
