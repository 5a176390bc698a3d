"""What known porting bugs make of right values: one formula each, for every kind of site.

The formulas are the NumPy oracle's own with one thing changed. `diagnosis` compares them with what a candidate shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.porting import Tensors
from vit_ref.sites import stream_before
from vit_ref.verify.oracle import ACTIVATIONS, layer_norm, softmax
from vit_ref.verify.trace import Trace

# What a bug is called, and what it would have made.
Guess = tuple[str, NDArray]
_EPSILONS = (0.0, *(10.0**-k for k in range(1, 17)))
# How an activation is called where it is guessed; names that mean the same function are left out.
NAMED = {
    "gelu": "erf GELU",
    "gelu_new": "tanh GELU",
    "quick_gelu": "quick GELU",
    "relu": "ReLU",
    "silu": "SiLU",
    "tanh": "tanh",
}


def _to(dtype: type) -> Callable[[NDArray], NDArray]:
    return lambda x: x.astype(dtype).astype(x.dtype)


def _tf32(x: NDArray) -> NDArray:
    """The ten bits of mantissa with which NVIDIA's matrix units multiply float32 by default."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


# What values are stored in, the coarsest first: what is exact in bfloat16 is so in float32.
STORED: dict[str, Callable[[NDArray], NDArray]] = {
    "bfloat16": _to(ml_dtypes.bfloat16),
    "float16": _to(np.float16),
    "float32": _to(np.float32),
}
# What matrix units multiply. TF32 and float16 have the same ten bits.
MULTIPLIED: dict[str, Callable[[NDArray], NDArray]] = {
    "bfloat16": _to(ml_dtypes.bfloat16),
    "ten bits of mantissa (TF32, float16)": _tf32,
}


def of_the_value(truth: NDArray, value: NDArray, part: tuple[NDArray, ...]) -> Iterator[Guess]:
    """Bugs that need no more than the right value: a factor, an order, a precision."""
    if not value[part].any():
        yield "zero", np.zeros_like(truth)
        return
    # One element is some factor of any other.
    if truth[part].any() and value[part].size > 1:
        factor = _slope(truth[part], value[part])
        if (shown := f"{factor:.6g}") != "1":
            yield f"{shown} x the reference", factor * truth
    for shift in (1, -1):
        for axis, name in zip(range(truth.ndim), ("images", "tokens"), strict=False):
            yield f"{name} shifted by {shift}", np.roll(truth, shift, axis)
    for name, rounded in STORED.items():
        if np.array_equal(rounded(value), value):
            yield f"rounded to {name}", value
            return


def _slope(x: NDArray, y: NDArray) -> float:
    """The factor with which x comes closest to y, 0 where x is nothing."""
    square = np.vdot(x, x)
    return float(np.vdot(x, y) / square) if square else 0.0


def in_another_order(truth: NDArray, value: NDArray, axes: tuple[str, ...]) -> Iterator[Guess]:
    """Everything right, but along one axis not in its place: heads, channels, classes, tokens or images.

    Args:
      truth: the right value.
      value: the candidate's.
      axes: what one index of each axis is called.
    """
    for axis, (name, size) in enumerate(zip(axes, truth.shape, strict=True)):
        theirs, right = (np.moveaxis(each, axis, 0).reshape(size, -1) for each in (value, truth))
        # Squared distances of each to each, less what is the same along a row.
        order = np.argmin(np.square(right).sum(axis=1) - 2 * theirs @ right.T, axis=1)
        if len(set(order)) == size and (order != np.arange(size)).any():
            first = ", ".join(map(str, order[:4])) + (", ..." if size > 4 else "")
            yield f"another order along the {name} axis ({first})", np.take(truth, order, axis)


# Hugging Face's names -> paths of this package's parameters. Not by the weight map, which may be what is wrong.
_RENAMED = (
    ("vit.", ""),
    ("encoder.layer.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
    ("attention.attention.", "attn."),
    ("attention.output.dense", "attn.out"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("embeddings.patch_embeddings.projection", "patch"),
    ("embeddings.", ""),
    ("pooler.dense", "pooler"),
    ("classifier", "head"),
)


def _by_path(tensors: Tensors) -> dict[str, NDArray]:
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        tensor = np.asarray(tensor)
        if name.endswith("weight"):
            name = name.replace("weight", "scale" if tensor.ndim == 1 else "kernel")
            # PyTorch's Linear keeps (out, in), its Conv2d (out, in, height, width).
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        found[name] = tensor
    return found


class Upstream:
    """What is known upstream of one site, and what each bug would make of it."""

    def __init__(self, config: ViTConfig, tensors: Tensors, pixels: NDArray, trace: Trace, site: str):
        self.config, self.pixels, self.trace, self.site = config, pixels, trace, site
        self.parameters = _by_path(tensors)
        # "block.3.attn.query" is "attn.query" in "block.3"; outside the blocks no name has a dot.
        parts = site.split(".")
        self.block, self.kind = (".".join(parts[:2]), ".".join(parts[2:])) if len(parts) > 1 else ("", site)
        before = stream_before(site, config.num_hidden_layers)
        self.stream = trace[before] if before else None

    def guesses(self) -> Iterator[Guess]:
        """(what a bug is called, what it would have made) for every bug that is known at this kind of site.

        The right formula may be among them: it explains no divergence.
        """
        kinds: dict[str, Callable[[], Iterator[Guess]]] = {
            "patches": self._patches,
            "embeddings": self._embeddings,
            "attn.probs": self._probs,
            "attn.context": self._context,
            "attn.residual": lambda: self._residual("norm1", "attn.out"),
            "mlp.hidden": self._hidden,
            "mlp.residual": lambda: self._residual("norm2", "mlp.out"),
            "pooler": self._pooler,
            "cls": self._pooled,
        }
        if self.kind in kinds:
            yield from kinds[self.kind]()
        elif self.kind.startswith("norm"):
            yield from self._norm()
        else:
            yield from self._dense()

    def in_format(self, rounded: Callable[[NDArray], NDArray]) -> Iterator[Guess]:
        """What the site's own computation makes of inputs that were rounded first, where it is a matrix product."""
        if self.kind in _INPUTS or self.kind == "logits":
            kernel, bias = self._layer(self._path())
            yield "inputs of the product", self._shaped(rounded(self._input()) @ rounded(kernel) + bias)
        if self.kind == "attn.context":
            probs, value = rounded(self._at("attn.probs")), rounded(self._at("attn.value"))
            yield "inputs of the product", np.einsum("bhqm,bmhk->bqhk", probs, value).reshape(self._shape())
        if self.kind == "attn.probs":
            query, key = rounded(self._at("attn.query")), rounded(self._at("attn.key"))
            scores = np.einsum("bqhk,bmhk->bhqm", query, key) / math.sqrt(self.config.head_dim)
            yield "inputs of the scores", softmax(scores)
            yield "scores", softmax(rounded(self._scores() / math.sqrt(self.config.head_dim)))

    def with_a_number(self, value: NDArray) -> Iterator[Guess]:
        """Bugs that have a number of their own, an epsilon or a scale of scores, which the candidate's value tells."""
        if self.kind.startswith("norm"):
            x, scale, bias = self._norm_arguments()
            centred = x - x.mean(axis=-1, keepdims=True)
            variance = np.square(centred).mean(axis=-1)
            # In the row with the least variance epsilon weighs most.
            row = np.unravel_index(np.argmin(np.where(variance > 0, variance, np.inf)), variance.shape)
            reciprocal = _slope(centred[row] * scale, value[row] - bias)
            if reciprocal and (epsilon := 1 / reciprocal**2 - float(variance[row])) > 0:
                yield f"LayerNorm epsilon {epsilon:.6g}", layer_norm(x, scale, bias, epsilon)
        if self.kind == "attn.probs" and (value > 0).all():
            scores = self._scores()
            apart, shown = (each - each.mean(axis=-1, keepdims=True) for each in (scores, np.log(value)))
            factor = _slope(apart, shown)
            times = factor * math.sqrt(self.config.head_dim)
            said = f"{times:.6g}" if abs(times - 1) > 1e-5 else f"{times:.12g}"
            yield f"attention scale {said} x the right one", softmax(factor * scores)

    def _at(self, kind: str) -> NDArray:
        return np.asarray(self.trace[f"{self.block}.{kind}"], np.float64)

    def _shape(self) -> tuple[int, ...]:
        return self.trace[self.site].shape

    def _shaped(self, y: NDArray) -> NDArray:
        return y.reshape(self._shape())

    def _path(self) -> str:
        """The path of the parameters that write this site."""
        if self.site == "logits":
            return "head"
        return self.site.replace("block.", "blocks.").replace("mlp.out", "mlp.fc2")

    def _layer(self, path: str) -> tuple[NDArray, NDArray]:
        kernel, bias = self._parameter(f"{path}.kernel"), f"{path}.bias"
        return kernel, self._parameter(bias) if bias in self.parameters else np.zeros(kernel.shape[-1])

    def _parameter(self, path: str) -> NDArray:
        return np.asarray(self.parameters[path], np.float64)

    def _input(self) -> NDArray:
        if self.site in ("logits", "pooler"):
            return np.asarray(self.trace["norm"][:, 0], np.float64)
        return self._at(_INPUTS[self.kind])

    def _patches(self) -> Iterator[Guess]:
        config, kernel = self.config, self._parameter("patch.kernel")
        bias = self._parameter("patch.bias")
        (height, width), channels, size = config.patch_hw, config.num_channels, config.hidden_size
        batch = len(self.pixels)
        rows, columns = config.grid(self.pixels.shape[1:3])

        def cut(pixels: NDArray) -> NDArray:
            apart = pixels.reshape(batch, rows, height, columns, width, channels).transpose(0, 1, 3, 2, 4, 5)
            return apart.reshape(batch, rows * columns, -1).astype(np.float64)

        patches = cut(self.pixels)
        flat = kernel.reshape(-1, size)
        if height == width:
            yield "patch kernel's height and width exchanged", patches @ kernel.swapaxes(0, 1).reshape(-1, size) + bias
        channels_first = kernel.transpose(2, 0, 1, 3).reshape(-1, size)
        yield "patch kernel's channels mixed with its pixels", patches @ channels_first + bias
        yield "patch kernel upside down", patches @ kernel[::-1].reshape(-1, size) + bias
        yield "patch kernel mirrored", patches @ kernel[:, ::-1].reshape(-1, size) + bias
        yield "patch kernel turned by 180 degrees", patches @ kernel[::-1, ::-1].reshape(-1, size) + bias
        yield "channels in reverse order", patches @ kernel[:, :, ::-1].reshape(-1, size) + bias
        yield "bias left out", patches @ flat
        right = patches @ flat + bias
        for sides in ((rows, columns), (columns, rows)):
            turned = right.reshape(batch, *sides, size).swapaxes(1, 2)
            yield "patches column by column", turned.reshape(batch, -1, size)
        shape = self.pixels.shape
        planes = self.pixels.reshape(batch, channels, *shape[1:3]).transpose(0, 2, 3, 1)
        yield "images read as NCHW", cut(planes) @ flat + bias
        yield "images read as NCHW", cut(self.pixels.transpose(0, 3, 1, 2).reshape(shape)) @ flat + bias
        for name, rounded in STORED.items():
            yield f"parameters rounded to {name}", patches @ rounded(flat) + rounded(bias)
        if self.pixels.shape[1] == self.pixels.shape[2]:
            yield "images transposed", cut(self.pixels.swapaxes(1, 2)) @ flat + bias

    def _embeddings(self) -> Iterator[Guess]:
        patches, config = self.trace["patches"], self.config
        cls = np.broadcast_to(self._parameter("cls_token"), (len(patches), 1, patches.shape[-1]))
        positions = self._parameter("position_embeddings")
        tokens = np.concatenate([cls, patches], axis=1)
        yield "no position embedding", tokens
        only_cls, only_patches = positions.copy(), positions.copy()
        only_cls[:, 1:], only_patches[:, :1] = 0, 0
        yield "cls token without its position", tokens + only_patches
        yield "cls token's position added twice", tokens + positions + only_cls
        yield "cls token left out", np.concatenate([np.zeros_like(cls), patches], axis=1) + positions
        yield "cls token last", np.concatenate([patches, cls], axis=1) + positions
        yield "cls token and its position last", np.roll(tokens + positions, -1, axis=1)
        yield "position rows shifted by one", tokens + np.roll(positions, 1, axis=1)
        rows, columns = config.grid(self.pixels.shape[1:3])
        grid = positions[:, 1:].reshape(1, rows, columns, -1)
        turned = grid.swapaxes(1, 2).reshape(1, rows * columns, -1)
        yield "position grid transposed", tokens + np.concatenate([positions[:, :1], turned], axis=1)
        swapped = positions[:, 1:].reshape(1, columns, rows, -1).swapaxes(1, 2).reshape(1, rows * columns, -1)
        yield "position grid transposed", tokens + np.concatenate([positions[:, :1], swapped], axis=1)

    def _norm_arguments(self) -> tuple[NDArray, NDArray, NDArray]:
        x = np.asarray(self._at("attn.residual") if self.kind == "norm2" else self.stream, np.float64)
        return x, self._parameter(f"{self._path()}.scale"), self._parameter(f"{self._path()}.bias")

    def _norm(self) -> Iterator[Guess]:
        x, scale, bias = self._norm_arguments()
        path, epsilon = self._path(), self.config.layer_norm_eps
        one, none = np.ones_like(scale), np.zeros_like(bias)
        for power in _EPSILONS:
            yield f"LayerNorm epsilon {power:.0e}", layer_norm(x, scale, bias, power)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        width = x.shape[-1]
        yield "no norm", x
        yield "norm without scale and bias", layer_norm(x, one, none, epsilon)
        yield "norm without scale", layer_norm(x, one, bias, epsilon)
        yield "norm without bias", layer_norm(x, scale, none, epsilon)
        yield "norm's scale counted from one", layer_norm(x, 1 + scale, bias, epsilon)
        for name, rounded in STORED.items():
            yield f"parameters rounded to {name}", layer_norm(x, rounded(scale), rounded(bias), epsilon)
        unbiased = variance * width / max(width - 1, 1)
        yield "variance over D - 1", centred / np.sqrt(unbiased + epsilon) * scale + bias
        yield "epsilon added to the deviation", centred / (np.sqrt(variance) + epsilon) * scale + bias
        yield "mean not taken away", x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * scale + bias
        for other in self._paths(".scale"):
            if other != path:
                pair = self._parameter(f"{other}.scale"), self._parameter(f"{other}.bias")
                yield f"parameters of {_named(other)}", layer_norm(x, *pair, epsilon)
                yield f"scale of {_named(other)}", layer_norm(x, pair[0], bias, epsilon)
        yield from (
            (f"input taken from {site}", layer_norm(np.asarray(value, np.float64), scale, bias, epsilon))
            for site, value in self._like(x)
        )

    def _dense(self) -> Iterator[Guess]:
        path, x = self._path(), self._input()
        kernel, bias = self._layer(path)
        straight = x @ kernel
        yield "bias left out", self._shaped(straight)
        if kernel.shape[0] == kernel.shape[1]:
            yield "kernel not transposed", self._shaped(x @ kernel.T + bias)
        for other in self._paths(".kernel"):
            if other != path and self.parameters[f"{other}.kernel"].shape == kernel.shape:
                their_kernel, their_bias = self._layer(other)
                product = x @ their_kernel
                yield f"parameters of {_named(other)}", self._shaped(product + their_bias)
                yield f"kernel of {_named(other)}", self._shaped(product + bias)
                yield f"bias of {_named(other)}", self._shaped(straight + their_bias)
        for name, rounded in STORED.items():
            yield f"parameters rounded to {name}", self._shaped(x @ rounded(kernel) + rounded(bias))
        for site, value in self._like(x):
            label = "input not normalised" if site == self._not_normalised() else f"input taken from {site}"
            yield label, self._shaped(np.asarray(value, np.float64) @ kernel + bias)
        if len(self._shape()) == 4:
            batch, tokens, heads, width = self._shape()
            y = (straight + bias).reshape(batch, tokens, width, heads)
            yield "heads split in the wrong order", y.swapaxes(2, 3)
            own = path.rpartition(".")[0]
            fused = np.concatenate([x @ k + b for k, b in (self._layer(f"{own}.{role}") for role in _ROLES)], axis=-1)
            by_head = fused.reshape(batch, tokens, heads, len(_ROLES), width)
            mine = _ROLES.index(path.removeprefix(f"{own}."))
            yield "fused query, key and value split in the wrong order", by_head[:, :, :, mine]
        if self.kind == "attn.out":
            by_head = kernel.reshape(-1, self.config.num_attention_heads, len(kernel)).swapaxes(0, 1)
            yield "heads merged in the wrong order", x @ by_head.reshape(kernel.shape) + bias
        if self.site == "logits":
            shifted = straight + bias - (straight + bias).max(axis=-1, keepdims=True)
            yield "softmax taken of the logits", softmax(shifted)
            yield "log_softmax taken of the logits", shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
            yield from ((label, pooled @ kernel + bias) for label, pooled in self._pooled())

    def _pooled(self) -> Iterator[Guess]:
        norm = np.asarray(self.trace["norm"], np.float64)
        yield "mean of the tokens pooled", norm.mean(axis=1)
        yield "mean of the patches pooled", norm[:, 1:].mean(axis=1)
        yield "last token pooled", norm[:, -1]
        yield "first patch pooled", norm[:, 1]
        yield "sum of the tokens pooled", norm.sum(axis=1)
        yield "tanh added", np.tanh(norm[:, 0])
        stream = np.asarray(self.stream, np.float64)
        yield "cls token pooled before the norm", stream[:, 0]
        scale, bias = self._parameter("norm.scale"), self._parameter("norm.bias")
        for label, kept in (("tokens", stream), ("patches", stream[:, 1:])):
            pooled = layer_norm(kept.mean(axis=1), scale, bias, self.config.layer_norm_eps)
            yield f"norm after the mean of the {label}", pooled

    def _pooler(self) -> Iterator[Guess]:
        kernel, bias = self._layer("pooler")
        right = ACTIVATIONS[self.config.pooler_act]
        yield "no activation", self._input() @ kernel + bias
        yield "bias left out", right(self._input() @ kernel)
        if kernel.shape[0] == kernel.shape[1]:
            yield "kernel not transposed", right(self._input() @ kernel.T + bias)
        for name, label in NAMED.items():
            yield label, ACTIVATIONS[name](self._input() @ kernel + bias)
        yield from ((label, right(pooled @ kernel + bias)) for label, pooled in self._pooled())

    def _scores(self) -> NDArray:
        """Products of queries and keys, (B, H, N, N), not scaled."""
        return np.einsum("bqhk,bmhk->bhqm", self._at("attn.query"), self._at("attn.key"))

    def _probs(self) -> Iterator[Guess]:
        config, scores = self.config, self._scores()
        right = 1 / math.sqrt(config.head_dim)
        scales = {
            "attention scale left out": 1.0,
            "attention scale applied twice": right**2,
            "attention scale inverted": 1 / right,
            "attention scale 1/sqrt(heads)": 1 / math.sqrt(config.num_attention_heads),
            "attention scale 1/sqrt(hidden_size)": 1 / math.sqrt(config.hidden_size),
            "attention scale 1/sqrt(64)": 1 / 8,
            "attention scale head_dim ** -0.25": math.sqrt(right),
        }
        yield from ((label, softmax(scale * scores)) for label, scale in scales.items())
        yield "query and key exchanged", softmax(right * scores.swapaxes(2, 3))
        yield "softmax over the queries", softmax(right * scores.swapaxes(2, 3)).swapaxes(2, 3)
        yield "softmax left out", right * scores
        causal = np.tril(np.ones(scores.shape[-2:], bool))
        yield "causal mask", softmax(np.where(causal, right * scores, -np.inf))
        by_head = scores.swapaxes(0, 1)
        yield "softmax over the heads", softmax((right * by_head).transpose(1, 2, 3, 0)).transpose(0, 3, 1, 2)

    def _context(self) -> Iterator[Guess]:
        probs, value = self._at("attn.probs"), self._at("attn.value")
        apart = np.einsum("bhqm,bmhk->bhqk", probs, value)
        yield "heads merged without moving the axis", self._shaped(apart)
        yield "heads merged in the wrong order", self._shaped(apart.transpose(0, 2, 3, 1))
        yield "attention over the queries", self._shaped(np.einsum("bhmq,bmhk->bqhk", probs, value))
        yield "keys attended to", self._shaped(np.einsum("bhqm,bmhk->bqhk", probs, self._at("attn.key")))

    def _hidden(self) -> Iterator[Guess]:
        before, right = self._at("mlp.fc1"), ACTIVATIONS[self.config.hidden_act]
        yield "no activation", before
        yield "activation applied twice", right(right(before))
        for name, label in NAMED.items():
            yield label, ACTIVATIONS[name](before)

    def _residual(self, norm: str, branch: str) -> Iterator[Guess]:
        stream = self._at("attn.residual") if norm == "norm2" else np.asarray(self.stream, np.float64)
        out, normed = self._at(branch), self._at(norm)
        yield "residual left out", out
        yield "branch left out", stream
        yield "residual taken after the norm", normed + out
        yield "residual added twice", 2 * stream + out
        yield "branch added twice", stream + 2 * out
        yield "branch subtracted", stream - out
        if norm == "norm2":
            yield "residual taken from before the attention", np.asarray(self.stream, np.float64) + out

    def _paths(self, leaf: str) -> list[str]:
        return [path.removesuffix(leaf) for path in self.parameters if path.endswith(leaf)]

    def _not_normalised(self) -> str | None:
        if self.kind == "mlp.fc1":
            return f"{self.block}.attn.residual"
        return stream_before(self.site, self.config.num_hidden_layers) if self.kind in _AFTER_NORM1 else None

    def _like(self, x: NDArray) -> Iterator[tuple[str, NDArray]]:
        """The values of x's shape that came before this site in its own block or right before it."""
        stream = stream_before(self.site, self.config.num_hidden_layers)
        for site, value in self.trace.items():
            if site == self.site:
                continue
            if value.shape == x.shape and (site == stream or (self.block and site.startswith(f"{self.block}."))):
                yield site, value


_AFTER_NORM1 = ("attn.query", "attn.key", "attn.value")
_ROLES = ("query", "key", "value")
# Where a matrix product in a block takes its input from.
_INPUTS = {
    "attn.query": "norm1",
    "attn.key": "norm1",
    "attn.value": "norm1",
    "attn.out": "attn.context",
    "mlp.fc1": "norm2",
    "mlp.out": "mlp.hidden",
}


def _named(path: str) -> str:
    """A parameter path as its site."""
    return path.replace("blocks.", "block.").replace("mlp.fc2", "mlp.out")
