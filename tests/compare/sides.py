"""One small model in several frameworks. It takes token ids and features, and returns seven numbers a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from numpy.typing import NDArray

import vit_ref

WORDS, FEATURES, WIDTH, HIDDEN, OUT, BLOCKS = 37, 5, 6, 11, 7, 2
EPSILON = 1e-5
Act = Callable[[Any], Any]


def weights(seed: int = 0) -> dict[str, NDArray]:
    """Returns float32 parameters by PyTorch's names. None has its initial value."""
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (WORDS, WIDTH), "proj.weight": (WIDTH, FEATURES), "proj.bias": (WIDTH,)}
    for i in range(BLOCKS):
        shapes |= {
            f"blocks.{i}.norm.weight": (WIDTH,),
            f"blocks.{i}.norm.bias": (WIDTH,),
            f"blocks.{i}.fc1.weight": (HIDDEN, WIDTH),
            f"blocks.{i}.fc1.bias": (HIDDEN,),
            f"blocks.{i}.fc2.weight": (WIDTH, HIDDEN),
            f"blocks.{i}.fc2.bias": (WIDTH,),
        }
    shapes |= {"head.weight": (OUT, WIDTH), "head.bias": (OUT,)}
    return {name: (rng.normal(size=shape) / 2).astype(np.float32) for name, shape in shapes.items()}


def inputs(seed: int) -> dict[str, NDArray]:
    """Returns two rows of four words with features."""
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, WORDS, (2, 4)), "features": rng.normal(size=(2, 4, FEATURES))}


def gelu(x: Any) -> Any:
    """Returns the exact GELU, in jax."""
    return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x: Any) -> Any:
    """Returns the approximate GELU, in jax."""
    return jax.nn.gelu(x, approximate=True)


def run(w: Mapping[str, Any], ids: Any, features: Any, tap: Any, act: Act = gelu, *, residual: bool = True) -> Any:
    """Returns the model as a function that passes its values through a tap, under the reference's names."""

    def linear(name: str, x: Any) -> Any:
        return tap(name, x @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
        return tap(name, scaled * w[f"{name}.weight"] + w[f"{name}.bias"])

    x = tap("embed", w["embed.weight"][ids]) + linear("proj", features)
    for i in range(BLOCKS):
        hidden = tap(f"blocks.{i}.act", act(linear(f"blocks.{i}.fc1", norm(f"blocks.{i}.norm", x))))
        out = linear(f"blocks.{i}.fc2", hidden)
        x = tap(f"blocks.{i}", x + out if residual else out)
    return linear("head", x.mean(1))


def function(**changes: Any) -> vit_ref.Candidate:
    """Declares the model as a function of its parameters that takes a tap."""

    def forward(w: Mapping[str, Any], ids: Any, features: Any, tap: Any = lambda name, value: value) -> Any:
        return run(w, ids, features, tap, **changes)

    return vit_ref.Candidate(load=lambda checkpoint: (forward, weights()), name="function")


class NnxBlock(nnx.Module):
    """A block in NNX, whose layers have other names."""

    def __init__(self, act: Act):
        rngs = nnx.Rngs(0)
        self.ln = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.act = act

    def __call__(self, x: Any) -> Any:
        return x + self.down(self.act(self.up(self.ln(x))))


class NnxModel(nnx.Module):
    """The model in NNX."""

    def __init__(self, act: Act = gelu, block: type[NnxBlock] = NnxBlock):
        rngs, w = nnx.Rngs(0), weights()
        self.embed, self.proj = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.layers = nnx.List([block(act) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)
        self.embed.embedding[...] = jnp.asarray(w["embed.weight"])
        layers = {"proj": self.proj, "head": self.head}
        for i, block in enumerate(self.layers):
            layers |= {f"blocks.{i}.norm": block.ln, f"blocks.{i}.fc1": block.up, f"blocks.{i}.fc2": block.down}
        for name, layer in layers.items():
            matrix = layer.scale if isinstance(layer, nnx.LayerNorm) else layer.kernel
            matrix[...] = jnp.asarray(w[f"{name}.weight"].T)
            layer.bias[...] = jnp.asarray(w[f"{name}.bias"])

    def __call__(self, ids: Any, features: Any) -> Any:
        x = self.embed(ids) + self.proj(features)
        for block in self.layers:
            x = block(x)
        return self.head(x.mean(1))


NNX_SITES: dict[str, Any] = {
    "embed": "embed",
    "proj": "proj",
    "layers.{i}.ln": "blocks.{i}.norm",
    "layers.{i}.up": "blocks.{i}.fc1",
    "layers.{i}.down:input": "blocks.{i}.act",
    "layers.{i}.down": "blocks.{i}.fc2",
    "layers.{i}": "blocks.{i}",
    "head": "head",
}


def in_nnx(act: Act = gelu) -> vit_ref.Candidate:
    """Declares the model in NNX, with its table."""
    return vit_ref.Candidate(load=lambda checkpoint: NnxModel(act), sites=NNX_SITES, name="nnx")


class LinenModel(linen.Module):
    """The model in linen, under the reference's names."""

    @linen.compact
    def __call__(self, ids: Any, features: Any) -> Any:
        x = linen.Embed(WORDS, WIDTH, name="embed")(ids) + linen.Dense(WIDTH, name="proj")(features)
        for i in range(BLOCKS):
            y = linen.LayerNorm(epsilon=EPSILON, name=f"norm{i}")(x)
            y = gelu(linen.Dense(HIDDEN, name=f"up{i}")(y))
            x = x + linen.Dense(WIDTH, name=f"down{i}")(y)
        return linen.Dense(OUT, name="head")(x.mean(1))


def in_linen(kind: type[vit_ref.Candidate] = vit_ref.Candidate, **fields: Any) -> Any:
    """Declares the model in linen, as a candidate or as a reference."""
    w = weights()

    def layer(name: str, matrix: str = "kernel") -> dict[str, NDArray]:
        return {matrix: w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}

    params: dict[str, Any] = {"embed": {"embedding": w["embed.weight"]}, "proj": layer("proj"), "head": layer("head")}
    for i in range(BLOCKS):
        params |= {f"norm{i}": layer(f"blocks.{i}.norm", "scale")}
        params |= {f"up{i}": layer(f"blocks.{i}.fc1"), f"down{i}": layer(f"blocks.{i}.fc2")}
    return kind(load=lambda checkpoint: (LinenModel(), {"params": params}), name="linen", **fields)
