"""The NumPy oracle: a ViT written from the papers, in float64, on a checkpoint's own tensors and names.

Independent on purpose: it shares no code with the model, the weight map or jax, so what both get wrong in the same way
has to be wrong twice. Tensors carry Hugging Face's PyTorch names and shapes. Sources: Dosovitskiy et al. (2021), eq.
1-4 (the model); Vaswani et al. (2017), eq. 1 (attention); Ba et al. (2016), eq. 3-4 (LayerNorm); Hendrycks and Gimpel
(2016), section 2 (GELU and its two approximations).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from scipy import special

from vit_ref.model.config import ViTConfig
from vit_ref.verify.compare.trace import Trace


def _gelu_tanh(x: NDArray) -> NDArray:
    inner = x.dtype.type(np.sqrt(2 / np.pi)) * (x + x.dtype.type(0.044715) * x**3)
    return x / 2 * (1 + np.tanh(inner))


def _gelu_erf(x: NDArray) -> NDArray:
    # erfc keeps its relative accuracy in the left tail, where 1 + erf cancels.
    return x / 2 * special.erfc(-x / x.dtype.type(np.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "gelu": _gelu_erf,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu_erf,
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


def whole(operand: NDArray) -> NDArray:
    """An operand of a product as it is, not rounded."""
    return operand


class NumpyOracle:
    """The oracle of one checkpoint. In float64 it is the truth; in float32 it says what rounding alone costs.

    Args:
      config: the model's configuration.
      tensors: Hugging Face's names (with or without "vit.") and shapes, any float dtype.
    """

    name = "NumPy"

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray]):
        self.config = config
        self.fill(tensors)

    def fill(self, tensors: Mapping[str, NDArray]) -> None:
        """Takes other weights."""
        self.tensors = {name.removeprefix("vit."): np.asarray(tensor) for name, tensor in tensors.items()}

    def trace(
        self, pixels: NDArray, dtype: DTypeLike = np.float64, replace: Mapping[str, NDArray] | None = None
    ) -> Trace:
        """See `Port.trace`; what is replaced is not computed, and its replacement recorded."""
        operand = self.operands(np.dtype(dtype))
        return _Pass(self.config, self.tensors, np.dtype(dtype), replace, operand=operand).run(pixels)

    def operands(self, dtype: np.dtype) -> Callable[[NDArray], NDArray]:
        """What is done to each operand of a product before they are multiplied: here nothing."""
        return whole

    def value(self, site: str, pixels: NDArray, known: Mapping[str, NDArray]) -> NDArray:
        """The float64 value at one site, where values of sites before it are given: only the rest is computed.

        Args:
          site: which.
          pixels: as in `trace`.
          known: values by site, taken as they are.
        """
        return _Pass(self.config, self.tensors, np.dtype(np.float64), known, until=site).run(pixels)[site]

    def formulas(self, pixels: NDArray, shown: Mapping[str, NDArray]) -> Trace:
        """What the right formula of each site makes, in float64, of the values that somebody shows before it.

        Args:
          pixels: as in `trace`.
          shown: somebody's values by site; a site that is not among them has the right formula's own.
        """
        right = _Formulas(self.config, self.tensors, np.dtype(np.float64), shown)
        right.run(pixels)
        return right.made


class _ReachedError(Exception):
    """The last site that was asked for has its value."""


class _Pass:
    """One forward pass, in one dtype, that stops at a site where it is told to, from products of rounded operands."""

    def __init__(
        self,
        config: ViTConfig,
        tensors: Mapping[str, NDArray],
        dtype: np.dtype,
        known: Mapping[str, NDArray] | None = None,
        until: str | None = None,
        operand: Callable[[NDArray], NDArray] = whole,
    ):
        self.config, self.tensors, self.dtype = config, tensors, dtype
        self.known, self.until, self.operand = known or {}, until, operand
        self.trace: Trace = {}

    def run(self, pixels: NDArray) -> Trace:
        with contextlib.suppress(_ReachedError):
            self.forward(pixels.astype(self.dtype))
        return self.trace

    def at(self, site: str, compute: Callable[[], NDArray]) -> NDArray:
        # In half precision the token stream is wider than the products: what takes its place may be, too.
        wide = np.promote_types(self.dtype, np.float32)
        self.trace[site] = self.known[site].astype(wide) if site in self.known else compute()
        if site == self.until:
            raise _ReachedError
        return self.trace[site]

    def weight(self, name: str) -> NDArray:
        return self.tensors[name].astype(self.dtype)

    def product(self, left: NDArray, right: NDArray) -> NDArray:
        return self.operand(left) @ self.operand(right)

    def linear(self, name: str, x: NDArray) -> NDArray:
        y = self.product(x, self.weight(f"{name}.weight").T)
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, name: str, x: NDArray) -> NDArray:
        return layer_norm(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), self.config.layer_norm_eps)

    def patches(self, pixels: NDArray) -> NDArray:
        (height, width), (rows, columns) = self.config.patch_hw, self.config.grid(pixels.shape[1:3])
        batch, channels = len(pixels), self.config.num_channels
        # Patches row by row; inside one, channel first, then row, then column, as PyTorch's kernel is laid out.
        cut = pixels.reshape(batch, rows, height, columns, width, channels).transpose(0, 1, 3, 5, 2, 4)
        projection = "embeddings.patch_embeddings.projection"
        kernel = self.weight(f"{projection}.weight").reshape(self.config.hidden_size, -1)
        return self.product(cut.reshape(batch, rows * columns, -1), kernel.T) + self.weight(f"{projection}.bias")

    def embeddings(self, patches: NDArray) -> NDArray:
        cls_token = np.broadcast_to(self.weight("embeddings.cls_token"), (len(patches), 1, patches.shape[-1]))
        return np.concatenate([cls_token, patches], axis=1) + self.weight("embeddings.position_embeddings")

    def forward(self, pixels: NDArray) -> None:
        config, at = self.config, self.at
        patches = at("patches", lambda: self.patches(pixels))
        x = at("embeddings", lambda: self.embeddings(patches))
        for i in range(config.num_hidden_layers):
            x = self.block(f"block.{i}", f"encoder.layer.{i}", x)
        cls = at("norm", lambda: self.norm("layernorm", x))[:, 0]
        if config.pooler:
            at("pooler", lambda: ACTIVATIONS[config.pooler_act](self.linear("pooler.dense", cls)))
        if config.num_labels:
            at("logits", lambda: self.linear("classifier", cls))
        if not (config.pooler or config.num_labels):
            at("cls", lambda: cls)

    def block(self, site: str, layer: str, x: NDArray) -> NDArray:
        at = self.at
        normed = at(f"{site}.norm1", lambda: self.norm(f"{layer}.layernorm_before", x))
        heads = (*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)

        def projected(role: str) -> NDArray:
            name = f"{layer}.attention.attention.{role}"
            return at(f"{site}.attn.{role}", lambda: self.linear(name, normed).reshape(heads)).transpose(0, 2, 1, 3)

        query, key, value = projected("query"), projected("key"), projected("value")
        scale = self.dtype.type(np.sqrt(self.config.head_dim))
        probs = at(f"{site}.attn.probs", lambda: softmax(self.product(query, key.transpose(0, 1, 3, 2)) / scale))
        context = at(f"{site}.attn.context", lambda: self.product(probs, value).transpose(0, 2, 1, 3).reshape(x.shape))
        attended = at(f"{site}.attn.out", lambda: self.linear(f"{layer}.attention.output.dense", context))
        middle = at(f"{site}.attn.residual", lambda: attended + x)
        normed_middle = at(f"{site}.norm2", lambda: self.norm(f"{layer}.layernorm_after", middle))
        before = at(f"{site}.mlp.fc1", lambda: self.linear(f"{layer}.intermediate.dense", normed_middle))
        hidden = at(f"{site}.mlp.hidden", lambda: ACTIVATIONS[self.config.hidden_act](before))
        transformed = at(f"{site}.mlp.out", lambda: self.linear(f"{layer}.output.dense", hidden))
        return at(f"{site}.mlp.residual", lambda: transformed + middle)


class _Formulas(_Pass):
    """A pass that makes its own value at every site, and goes on from what is known there."""

    made: Trace

    def run(self, pixels: NDArray) -> Trace:
        self.made = {}
        return super().run(pixels)

    def at(self, site: str, compute: Callable[[], NDArray]) -> NDArray:
        self.made[site] = compute()
        return super().at(site, lambda: self.made[site])
