"""What known porting bugs make of right values: one formula each, for every kind of site.

The formulas are the NumPy oracle's own with one thing changed. `diagnosis` compares them with what a candidate shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import stream_before
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.diagnose.guesses import STORED, Guess, slope
from vit_ref.verify.references.numpy_oracle import ACTIVATIONS, layer_norm, softmax
from vit_ref.weights.mapping import Tensors

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


def _told(factor: float) -> str:
    """A factor in as many digits as tell it from one."""
    return f"{factor:.6g}" if abs(factor - 1) > 1e-5 else f"{factor:.12g}"


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
            "attn.residual": self._residual,
            "mlp.hidden": self._hidden,
            "mlp.residual": self._residual,
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
        """Bugs that have a number of their own, which the candidate's value tells: an epsilon, a scale."""
        if self.kind.startswith("norm"):
            x, scale, bias = self._norm_arguments()
            centred = x - x.mean(axis=-1, keepdims=True)
            variance = np.square(centred).mean(axis=-1)
            # In the row with the least variance epsilon weighs most.
            row = np.unravel_index(np.argmin(np.where(variance > 0, variance, np.inf)), variance.shape)
            reciprocal = slope(centred[row] * scale, value[row] - bias)
            if reciprocal and (epsilon := 1 / reciprocal**2 - float(variance[row])) > 0:
                yield f"LayerNorm epsilon {epsilon:.6g}", layer_norm(x, scale, bias, epsilon)
        if self.kind == "attn.probs" and (value > 0).all():
            scores = self._scores()
            apart, shown = (each - each.mean(axis=-1, keepdims=True) for each in (scores, np.log(value)))
            factor = slope(apart, shown)
            times = _told(factor * math.sqrt(self.config.head_dim))
            yield f"attention scale {times} x the right one", softmax(factor * scores)
        if self.kind in _BRANCHES:
            stream, branch = self._entering(), self._at(_BRANCHES[self.kind])
            factor = slope(branch, value - stream)
            yield f"{_told(factor)} x the branch added", stream + factor * branch

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
        yield "images upside down", cut(self.pixels[:, ::-1]) @ flat + bias
        yield "images mirrored", cut(self.pixels[:, :, ::-1]) @ flat + bias
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
        return self._entering(), self._parameter(f"{self._path()}.scale"), self._parameter(f"{self._path()}.bias")

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
            innermost = fused.reshape(batch, tokens, heads, width, len(_ROLES))
            yield "fused query, key and value split in the wrong order", innermost[..., mine]
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

    def _entering(self) -> NDArray:
        """The stream that is normalised, or added to."""
        halfway = self.kind in ("norm2", "mlp.residual")
        return self._at("attn.residual") if halfway else np.asarray(self.stream, np.float64)

    def _residual(self) -> Iterator[Guess]:
        stream, out = self._entering(), self._at(_BRANCHES[self.kind])
        normed = self._at("norm2" if self.kind == "mlp.residual" else "norm1")
        yield "residual left out", out
        yield "branch left out", stream
        yield "residual taken after the norm", normed + out
        yield "residual added twice", 2 * stream + out
        yield "branch added twice", stream + 2 * out
        yield "branch subtracted", stream - out
        if self.kind == "mlp.residual":
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
# What is added to the stream.
_BRANCHES = {"attn.residual": "attn.out", "mlp.residual": "mlp.out"}
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
