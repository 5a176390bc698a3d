"""The NumPy oracle: a ViT written from the papers, in float64, on a checkpoint's own tensors and names.

Independent on purpose: it shares no code with the model, the weight map or jax, so what both get wrong in the same way
has to be wrong twice. Tensors carry Hugging Face's PyTorch names and shapes. Sources: Dosovitskiy et al. (2021), eq.
1-4 (the model); Vaswani et al. (2017), eq. 1 (attention); Ba et al. (2016), eq. 3-4 (LayerNorm); Hendrycks and Gimpel
(2016), section 2 (GELU and its two approximations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from scipy import special

from vit_ref.config import ViTConfig
from vit_ref.verify.trace import Trace


def _gelu_tanh(x: NDArray) -> NDArray:
    inner = x.dtype.type(np.sqrt(2 / np.pi)) * (x + x.dtype.type(0.044715) * x**3)
    return x / 2 * (1 + np.tanh(inner))


def _gelu_erf(x: NDArray) -> NDArray:
    # erfc keeps its relative accuracy in the left tail, where 1 + erf cancels.
    return x / 2 * special.erfc(-x / x.dtype.type(np.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "gelu": _gelu_erf,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * special.expit(x.dtype.type(1.702) * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * special.expit(x),
    "swish": lambda x: x * special.expit(x),
    "tanh": np.tanh,
}


def layer_norm(x: NDArray, scale: NDArray, bias: NDArray, epsilon: float) -> NDArray:
    """Ba et al. (2016), eq. 3-4, over the last axis, in x's dtype."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + x.dtype.type(epsilon)) * scale + bias


def softmax(scores: NDArray) -> NDArray:
    """Over the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


class NumpyOracle:
    """The oracle of one checkpoint. In float64 it is the truth; in float32 it says what rounding alone costs.

    Args:
      config: the model's configuration.
      tensors: Hugging Face's names (with or without "vit.") and shapes, any float dtype.
    """

    name = "NumPy"

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray]):
        self.config = config
        self.tensors = {name.removeprefix("vit."): np.asarray(tensor) for name, tensor in tensors.items()}

    def trace(self, pixels: NDArray, dtype: DTypeLike = np.float64) -> Trace:
        """See `Implementation.trace`."""
        return _forward(self.config, self.tensors, pixels, np.dtype(dtype))


def _forward(config: ViTConfig, tensors: Mapping[str, NDArray], pixels: NDArray, dtype: np.dtype) -> Trace:
    trace: Trace = {}

    def weight(name: str) -> NDArray:
        return tensors[name].astype(dtype)

    def linear(name: str, x: NDArray) -> NDArray:
        y = x @ weight(f"{name}.weight").T
        return y + weight(f"{name}.bias") if f"{name}.bias" in tensors else y

    def norm(name: str, x: NDArray) -> NDArray:
        return layer_norm(x, weight(f"{name}.weight"), weight(f"{name}.bias"), config.layer_norm_eps)

    (height, width), (rows, columns) = config.patch_hw, config.grid(pixels.shape[1:3])
    batch, channels, size = len(pixels), config.num_channels, config.hidden_size
    # Patches row by row; inside one, channel first, then row, then column, as PyTorch's kernel is laid out.
    cut = pixels.astype(dtype).reshape(batch, rows, height, columns, width, channels).transpose(0, 1, 3, 5, 2, 4)
    kernel = weight("embeddings.patch_embeddings.projection.weight").reshape(size, -1)
    patches = cut.reshape(batch, rows * columns, -1) @ kernel.T
    trace["patches"] = patches + weight("embeddings.patch_embeddings.projection.bias")
    cls_token = np.broadcast_to(weight("embeddings.cls_token"), (batch, 1, size))
    x = np.concatenate([cls_token, trace["patches"]], axis=1) + weight("embeddings.position_embeddings")
    trace["embeddings"] = x

    for i in range(config.num_hidden_layers):
        layer, site = f"encoder.layer.{i}", f"block.{i}"
        normed = trace[f"{site}.norm1"] = norm(f"{layer}.layernorm_before", x)
        heads = (batch, x.shape[1], config.num_attention_heads, config.head_dim)
        for role in ("query", "key", "value"):
            trace[f"{site}.attn.{role}"] = linear(f"{layer}.attention.attention.{role}", normed).reshape(heads)
        query, key, value = (trace[f"{site}.attn.{role}"].transpose(0, 2, 1, 3) for role in ("query", "key", "value"))
        scores = query @ key.transpose(0, 1, 3, 2) / dtype.type(np.sqrt(config.head_dim))
        probs = trace[f"{site}.attn.probs"] = softmax(scores)
        context = trace[f"{site}.attn.context"] = (probs @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        out = trace[f"{site}.attn.out"] = linear(f"{layer}.attention.output.dense", context)
        x = trace[f"{site}.attn.residual"] = out + x
        normed = trace[f"{site}.norm2"] = norm(f"{layer}.layernorm_after", x)
        before = trace[f"{site}.mlp.fc1"] = linear(f"{layer}.intermediate.dense", normed)
        hidden = trace[f"{site}.mlp.hidden"] = ACTIVATIONS[config.hidden_act](before)
        out = trace[f"{site}.mlp.out"] = linear(f"{layer}.output.dense", hidden)
        x = trace[f"{site}.mlp.residual"] = out + x

    normed = trace["norm"] = norm("layernorm", x)
    if config.pooler:
        trace["pooler"] = ACTIVATIONS[config.pooler_act](linear("pooler.dense", normed[:, 0]))
    if config.num_labels:
        trace["logits"] = linear("classifier", normed[:, 0])
    return trace
