"""The NumPy oracle: a ViT written from the papers, in float64, with a checkpoint's own tensors and names.

It is independent on purpose and shares no code with the model, the weight map or jax. So a mistake must be made twice
to go unnoticed. It takes only the names and the order of the sites from elsewhere. Tensors carry Hugging Face's PyTorch
names and shapes. Sources:

- the model: Dosovitskiy et al. (2021), eq. 1-4;
- attention: Vaswani et al. (2017), eq. 1;
- LayerNorm: Ba et al. (2016), eq. 3-4;
- GELU and its two approximations: Hendrycks and Gimpel (2016), section 2.

`STEPS` is the model, one formula per site. The diagnosis edits one formula at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import copy
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from scipy import special

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites, stream_before
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


def centred(x: NDArray) -> NDArray:
    """Subtracts the mean over the last axis.

    Args:
      x: an array (..., D).
    """
    return x - x.mean(axis=-1, keepdims=True)


def softmax(scores: NDArray, axis: int = -1) -> NDArray:
    """Returns the softmax over one axis.

    Args:
      scores: an array.
      axis: the axis, by default the last.
    """
    exponentials = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def whole(operand: NDArray) -> NDArray:
    """Returns an operand of a product as it is, not rounded.

    Args:
      operand: an array.
    """
    return operand


class Layer(NamedTuple):
    """The parameters and settings of a site's formula.

    Attributes:
      config: the model's configuration.
      dtype: the dtype of the computation.
      tensors: the site's own tensors by the last part of their names, in that dtype.
      operand: the function that is applied to each operand before a product.
    """

    config: ViTConfig
    dtype: np.dtype
    tensors: Mapping[str, NDArray]
    operand: Callable[[NDArray], NDArray] = whole

    def product(self, left: NDArray, right: NDArray) -> NDArray:
        """Returns the matrix product of two arrays.

        Args:
          left: the left operand.
          right: the right operand.
        """
        return self.operand(left) @ self.operand(right)


# Computes a site's value from its layer and from the values that it reads. `model.sites` explains the letters in
# shapes.
Formula = Callable[..., NDArray]


def patches(layer: Layer, pixels: NDArray) -> NDArray:
    """Returns the patches (B, P, D) of pixels (B, height, width, C)."""
    config, kernel = layer.config, layer.tensors["weight"]
    (height, width), (rows, columns) = config.patch_hw, config.grid(pixels.shape[1:3])
    # Patches lie row by row. Inside a patch the order is channel, row, column, as in PyTorch's kernel.
    cut = pixels.reshape(-1, rows, height, columns, width, config.num_channels).transpose(0, 1, 3, 5, 2, 4)
    flat = kernel.reshape(config.hidden_size, -1)
    return layer.product(cut.reshape(len(pixels), rows * columns, -1), flat.T) + layer.tensors["bias"]


def tokens(layer: Layer, patches: NDArray) -> NDArray:
    """Returns the cls token followed by the patches (B, N, D)."""
    cls_token = np.broadcast_to(layer.tensors["cls_token"], (len(patches), 1, patches.shape[-1]))
    return np.concatenate([cls_token, patches], axis=1)


def embeddings(layer: Layer, patches: NDArray) -> NDArray:
    """Returns tokens plus their positions (B, N, D)."""
    return tokens(layer, patches) + layer.tensors["position_embeddings"]


def affine(layer: Layer, x: NDArray) -> NDArray:
    """Applies the scale and bias of a LayerNorm."""
    return x * layer.tensors["weight"] + layer.tensors["bias"]


def norm(layer: Layer, x: NDArray) -> NDArray:
    """Normalises over the last axis in x's dtype: Ba et al. (2016), eq. 3-4."""
    apart = centred(x)
    variance = np.square(apart).mean(axis=-1, keepdims=True)
    return affine(layer, apart / np.sqrt(variance + x.dtype.type(layer.config.layer_norm_eps)))


def linear(layer: Layer, x: NDArray) -> NDArray:
    """Multiplies the input by a kernel and adds the bias, if there is one."""
    y = layer.product(x, layer.tensors["weight"].T)
    return y + layer.tensors["bias"] if "bias" in layer.tensors else y


def heads(layer: Layer, x: NDArray) -> NDArray:
    """Returns a projection split into heads (B, N, H, K)."""
    return linear(layer, x).reshape(*x.shape[:2], layer.config.num_attention_heads, layer.config.head_dim)


def scores(layer: Layer, query: NDArray, key: NDArray) -> NDArray:
    """Returns the scaled products of each query with each key (B, H, N, N)."""
    products = layer.product(query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1))
    return products / layer.dtype.type(np.sqrt(layer.config.head_dim))


def probs(layer: Layer, query: NDArray, key: NDArray) -> NDArray:
    """Returns the attention probabilities (B, H, N, N): Vaswani et al. (2017), eq. 1, without the value."""
    return softmax(scores(layer, query, key))


def context(layer: Layer, probs: NDArray, value: NDArray) -> NDArray:
    """Returns the sum of values that each query attends to, with heads merged (B, N, D)."""
    gathered = layer.product(probs, value.transpose(0, 2, 1, 3))
    return gathered.transpose(0, 2, 1, 3).reshape(*value.shape[:2], -1)


def logits(layer: Layer, norm: NDArray) -> NDArray:
    """Applies the head to the cls token: (B, L)."""
    return linear(layer, norm[:, 0])


def pooler(layer: Layer, norm: NDArray) -> NDArray:
    """Applies the pooler to the cls token: (B, O)."""
    return ACTIVATIONS[layer.config.pooler_act](logits(layer, norm))


def _add(layer: Layer, branch: NDArray, stream: NDArray) -> NDArray:
    return branch + stream


class Step(NamedTuple):
    """How the value at a kind of site is computed.

    Attributes:
      formula: the function that computes it.
      reads: the values that the formula takes: "pixels", sites of the same block or outside all blocks, or "stream",
        which is the value that enters the block.
      layer: Hugging Face's name of its parameters, without the block's part.
    """

    formula: Formula
    reads: tuple[str, ...]
    layer: str = ""


# The whole model.
STEPS: dict[str, Step] = {
    "patches": Step(patches, ("pixels",), "embeddings.patch_embeddings.projection"),
    "embeddings": Step(embeddings, ("patches",), "embeddings"),
    "norm1": Step(norm, ("stream",), "layernorm_before"),
    "attn.query": Step(heads, ("norm1",), "attention.attention.query"),
    "attn.key": Step(heads, ("norm1",), "attention.attention.key"),
    "attn.value": Step(heads, ("norm1",), "attention.attention.value"),
    "attn.probs": Step(probs, ("attn.query", "attn.key")),
    "attn.context": Step(context, ("attn.probs", "attn.value")),
    "attn.out": Step(linear, ("attn.context",), "attention.output.dense"),
    "attn.residual": Step(_add, ("attn.out", "stream")),
    "norm2": Step(norm, ("attn.residual",), "layernorm_after"),
    "mlp.fc1": Step(linear, ("norm2",), "intermediate.dense"),
    "mlp.hidden": Step(lambda layer, x: ACTIVATIONS[layer.config.hidden_act](x), ("mlp.fc1",)),
    "mlp.out": Step(linear, ("mlp.hidden",), "output.dense"),
    "mlp.residual": Step(_add, ("mlp.out", "attn.residual")),
    "norm": Step(norm, ("stream",), "layernorm"),
    "pooler": Step(pooler, ("norm",), "pooler.dense"),
    "logits": Step(logits, ("norm",), "classifier"),
    "cls": Step(lambda layer, norm: norm[:, 0], ("norm",)),
}

_LEAVES = ("weight", "bias", "cls_token", "position_embeddings")


def split(site: str) -> tuple[str, str]:
    """Returns a site's block and kind: ("block.3.", "attn.query"), or ("", "norm") outside the blocks.

    Args:
      site: the site's name.
    """
    parts = site.split(".", 2)
    return (f"{parts[0]}.{parts[1]}.", parts[2]) if len(parts) > 1 else ("", site)


class NumpyOracle:
    """The oracle of one checkpoint. In float64 it is the truth; in float32 it shows the effect of rounding alone.

    Args:
      config: the model's configuration.
      tensors: arrays of any float dtype under Hugging Face's names, with or without "vit.".

    Attributes:
      sites: all sites in order.
    """

    name = "NumPy"

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray]):
        self.config = config
        self.sites = [site.name for site in sites(config, 1)]
        self._edits: dict[str, Step] = {}
        self.fill(tensors)

    def fill(self, tensors: Mapping[str, NDArray]) -> None:
        """Takes other weights.

        Args:
          tensors: see `NumpyOracle`.
        """
        self.tensors = {name.removeprefix("vit."): np.asarray(tensor) for name, tensor in tensors.items()}

    def trace(
        self, pixels: NDArray, dtype: DTypeLike = np.float64, replace: Mapping[str, NDArray] | None = None
    ) -> Trace:
        """Implements `Observable.trace`. It records a replacement without computing the replaced value."""
        return self._run(pixels, np.dtype(dtype), replace or {}, self.sites)

    def operands(self, dtype: np.dtype) -> Callable[[NDArray], NDArray]:
        """Returns the function that is applied to each operand before a product: here none.

        Args:
          dtype: the dtype of the computation.
        """
        return whole

    def value(self, site: str, pixels: NDArray, known: Mapping[str, NDArray]) -> NDArray:
        """Returns the float64 value at one site, and computes only what the known values leave open.

        Args:
          site: the site's name.
          pixels: float32 images (B, height, width, C).
          known: values by site, which are used as they are.
        """
        needed = {site}
        for name in reversed(self.sites):
            if name in needed and name not in known:
                needed.update(self.reads(name))
        return self._run(pixels, np.dtype(np.float64), known, needed)[site]

    def formulas(self, pixels: NDArray, shown: Mapping[str, NDArray]) -> Trace:
        """Returns what the right formula of each site computes, in float64, from a candidate's values before it.

        Args:
          pixels: float32 images (B, height, width, C).
          shown: the candidate's values by site. The right value stands in for a site that is missing or has a wrong
            shape.
        """
        dtype, made = np.dtype(np.float64), Trace()
        values = {"pixels": pixels.astype(dtype)}
        for site in self.sites:
            made[site] = self._make(site, values, dtype)
            fits = site in shown and shown[site].shape == made[site].shape
            values[site] = shown[site].astype(dtype) if fits else made[site]
        return made

    def edited(self, site: str, step: Step) -> NumpyOracle:
        """Returns an oracle that computes the value at one site in another way.

        Args:
          site: the site's name.
          step: the other way.
        """
        other = copy(self)
        other._edits = {site: step}
        return other

    def before(self, site: str, known: Mapping[str, NDArray]) -> Trace:
        """Returns those of the known values that come before a site.

        Args:
          site: the site's name.
          known: values by site.
        """
        return {name: known[name] for name in self.sites[: self.sites.index(site)] if name in known}

    def step(self, site: str) -> Step:
        """Returns how the value at a site is computed.

        Args:
          site: the site's name.
        """
        return self._edits.get(site) or STEPS[split(site)[1]]

    def reads(self, site: str) -> tuple[str, ...]:
        """Returns the sites that a site's formula reads, or "pixels".

        Args:
          site: the site's name.
        """
        return tuple(self.read(site, name) for name in self.step(site).reads)

    def read(self, site: str, name: str) -> str:
        """Returns the site that a name of `Step.reads` means.

        Args:
          site: the site whose formula reads it.
          name: the name.
        """
        if name == "stream":
            return stream_before(site, self.config.num_hidden_layers) or ""
        return f"{split(site)[0]}{name}"

    def own(self, site: str) -> dict[str, NDArray]:
        """Returns a site's tensors by the last part of their names.

        Args:
          site: the site's name.
        """
        block, _ = split(site)
        prefix = f"{block.replace('block.', 'encoder.layer.')}{self.step(site).layer}."
        return {leaf: self.tensors[prefix + leaf] for leaf in _LEAVES if prefix + leaf in self.tensors}

    def _run(self, pixels: NDArray, dtype: np.dtype, known: Mapping[str, NDArray], needed: Collection[str]) -> Trace:
        values = {"pixels": pixels.astype(dtype)}
        # In half precision the token stream is wider than the products, and its replacement may be, too.
        wide = np.promote_types(dtype, np.float32)
        for site in self.sites:
            if site in needed:
                values[site] = known[site].astype(wide) if site in known else self._make(site, values, dtype)
        del values["pixels"]
        return values

    def _make(self, site: str, values: Mapping[str, NDArray], dtype: np.dtype) -> NDArray:
        step = self.step(site)
        own = {name: tensor.astype(dtype) for name, tensor in self.own(site).items()}
        layer = Layer(self.config, dtype, own, self.operands(dtype))
        return step.formula(layer, *(values[name] for name in self.reads(site)))
