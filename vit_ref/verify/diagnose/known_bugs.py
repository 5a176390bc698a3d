"""Lists the known porting bugs: each one is an edit of the NumPy oracle.

The edited oracle computes what a candidate with that bug computes. `list_known_bugs` is the table. A new bug is one
more line there: its label, and one edit of how a site's value is computed. The edit changes the configuration, the
tensors, the values that the formula reads, or the formula itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import BLOCK_SITES
from vit_ref.verify.diagnose.predictions import slope
from vit_ref.verify.references import numpy_oracle as right
from vit_ref.verify.references.numpy_oracle import Formula, Layer, NumpyOracle, Step, centred, split
from vit_ref.verify.rounding import STORED
from vit_ref.weights.mapping import Tensors

# Turns the right way to compute a site's value into a wrong one.
Edit = Callable[[Step], Step]


class KnownBug(NamedTuple):
    """A known porting bug.

    Attributes:
      label: what the candidate does instead of the right thing.
      edit: the change of the oracle that introduces the bug.
      at: the site that is edited, if the bug shows at a later site only; else "".
    """

    label: str
    edit: Edit
    at: str = ""

    def value(self, oracle: NumpyOracle, site: str, pixels: NDArray, known: Mapping[str, NDArray]) -> NDArray:
        """Returns the float64 value at a site of a model that has this bug and no other.

        Args:
          oracle: the right oracle.
          site: the site's name.
          pixels: float32 images (B, height, width, C).
          known: right values by site. Values before the bug are taken from here.
        """
        at = self.at or site
        wrong = oracle.edited(at, self.edit(oracle.step(at)))
        return wrong.value(site, pixels, oracle.before(at, known))


def read(*names: str) -> Edit:
    """Makes the formula read other sites, named as in `Step.reads`."""
    return lambda step: step._replace(reads=names)


def compute(formula: Formula) -> Edit:
    """Replaces the formula."""
    return lambda step: step._replace(formula=formula)


def finish(change: Callable[[NDArray], NDArray]) -> Edit:
    """Changes the right value after it is computed."""
    return lambda step: compute(lambda layer, *values: change(step.formula(layer, *values)))(step)


def feed(change: Callable[..., Any]) -> Edit:
    """Changes the values that the right formula reads. `change` returns one array, or a tuple for several."""

    def changed(*values: NDArray) -> tuple[NDArray, ...]:
        found = change(*values)
        return found if isinstance(found, tuple) else (found,)

    return lambda step: compute(lambda layer, *values: step.formula(layer, *changed(*values)))(step)


def multiply(*factors: float) -> Edit:
    """Multiplies the values that the right formula reads, one factor each."""
    return feed(lambda *values: tuple(factor * value for factor, value in zip(factors, values, strict=True)))


def equip(change: Callable[[Layer], Mapping[str, Any]]) -> Edit:
    """Changes some fields of the layer that the right formula uses."""
    return lambda step: compute(lambda layer, *values: step.formula(layer._replace(**change(layer)), *values))(step)


def configure(**fields: Any) -> Edit:
    """Changes the configuration."""
    return equip(lambda layer: {"config": dataclasses.replace(layer.config, **fields)})


def load(every: Callable[[NDArray], NDArray] = np.asarray, **by_name: Callable[[NDArray], NDArray]) -> Edit:
    """Changes the site's own tensors, all of them or some by name. A change that alters a shape is not applied."""

    def changed(leaf: str, tensor: NDArray) -> NDArray:
        other = by_name.get(leaf, every)(tensor)
        return other if other.shape == tensor.shape else tensor

    return equip(lambda layer: {"tensors": {leaf: changed(leaf, tensor) for leaf, tensor in layer.tensors.items()}})


# Names of activations in causes. Other names of the same functions are left out.
NAMED = {
    "gelu": "erf GELU",
    "gelu_new": "tanh GELU",
    "quick_gelu": "quick GELU",
    "relu": "ReLU",
    "silu": "SiLU",
    "tanh": "tanh",
}
# A configuration cannot have an epsilon of zero. The smallest number has the same effect.
_EPSILONS = {"0e+00": float(np.finfo(np.float64).tiny)} | {f"1e-{k:02}": 10.0**-k for k in range(1, 17)}


def list_known_bugs(config: ViTConfig) -> dict[str, list[tuple[Any, ...]]]:
    """Returns the table of known bugs: the fields of each `KnownBug`, by the kind of site at which the bug shows.

    Args:
      config: the model's configuration.
    """
    heads, width = config.num_attention_heads, config.head_dim
    grids = config.grid(), config.grid()[::-1]

    def regroup(*axes: int) -> Callable[[NDArray], NDArray]:
        """Returns an edit of merged heads, as if the axes (B, N, H, K) had another order before the merge."""
        return lambda x: x.reshape(*x.shape[:2], heads, width).transpose(axes).reshape(x.shape)

    rounded = [(f"parameters rounded to {name}", load(to)) for name, to in STORED.items()]
    dense = [
        ("bias left out", load(bias=np.zeros_like)),
        ("kernel not transposed", load(weight=np.transpose)),
        ("kernel saved with the memory of its transpose", load(weight=_keep_memory)),
        *rounded,
    ]
    norm = [
        *((f"LayerNorm epsilon {label}", configure(layer_norm_eps=epsilon)) for label, epsilon in _EPSILONS.items()),
        ("LayerNorm left out", compute(lambda layer, x: x)),
        ("LayerNorm without scale and bias", load(weight=np.ones_like, bias=np.zeros_like)),
        ("LayerNorm without scale", load(weight=np.ones_like)),
        ("LayerNorm without bias", load(bias=np.zeros_like)),
        ("one added to the norm's scale", load(weight=lambda scale: 1 + scale)),
        *rounded,
        (
            "variance over D - 1",
            _normalise(lambda x, eps: centred(x) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + eps)),
        ),
        (
            "epsilon added to the standard deviation",
            _normalise(lambda x, eps: centred(x) / (x.std(-1, keepdims=True) + eps)),
        ),
        ("mean not subtracted", _normalise(lambda x, eps: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps))),
        (
            "mean subtracted for the variance only",
            _normalise(lambda x, eps: x / np.sqrt(x.var(-1, keepdims=True) + eps)),
        ),
    ]
    projection = [
        *dense,
        ("heads split in the wrong order", finish(lambda x: x.reshape(*x.shape[:2], width, heads).swapaxes(2, 3))),
    ]
    residual = [
        ("residual left out", multiply(1, 0)),
        ("branch left out", multiply(0, 1)),
        ("residual added twice", multiply(1, 2)),
        ("branch added twice", multiply(2, 1)),
        ("branch subtracted", multiply(-1, 1)),
    ]
    # The right formulas take the first token of those that they read.
    pooled = [
        ("mean of the tokens pooled", feed(lambda norm: norm.mean(axis=1, keepdims=True))),
        ("mean of the patches pooled", feed(lambda norm: norm[:, 1:].mean(axis=1, keepdims=True))),
        ("last token pooled", feed(lambda norm: norm[:, -1:])),
        ("first patch pooled", feed(lambda norm: norm[:, 1:])),
        ("sum of the tokens pooled", feed(lambda norm: norm.sum(axis=1, keepdims=True))),
        ("tanh added", feed(np.tanh)),
        ("cls token pooled before the norm", read("stream")),
        ("norm after the mean of the tokens", feed(lambda x: x.mean(axis=1, keepdims=True)), "norm"),
        ("norm after the mean of the patches", feed(lambda x: x[:, 1:].mean(axis=1, keepdims=True)), "norm"),
    ]
    return {
        "patches": [
            ("patch kernel's height and width exchanged", load(weight=lambda w: w.swapaxes(2, 3))),
            ("patch kernel's channels mixed with its pixels", load(weight=_mix_channels)),
            ("patch kernel saved with the memory of its transpose", load(weight=_keep_patch_memory)),
            ("patch kernel upside down", load(weight=lambda w: w[:, :, ::-1])),
            ("patch kernel mirrored", load(weight=lambda w: w[:, :, :, ::-1])),
            ("patch kernel rotated by 180 degrees", load(weight=lambda w: w[:, :, ::-1, ::-1])),
            ("channels in reverse order", load(weight=lambda w: w[:, ::-1])),
            ("bias left out", load(bias=np.zeros_like)),
            *rounded,
            *(("patches column by column", finish(partial(_transpose, grid=grid))) for grid in grids),
            ("images read as NCHW", feed(lambda x: np.moveaxis(x, -1, 1).reshape(x.shape))),
            ("images read as NCHW", feed(lambda x: np.moveaxis(x.reshape(len(x), -1, *x.shape[1:3]), 1, -1))),
            ("images upside down", feed(lambda x: x[:, ::-1])),
            ("images mirrored", feed(lambda x: x[:, :, ::-1])),
            ("images transposed", feed(lambda x: x.swapaxes(1, 2) if x.shape[1] == x.shape[2] else x)),
        ],
        "embeddings": [
            ("no position embedding", load(position_embeddings=np.zeros_like)),
            ("cls token without its position", load(position_embeddings=lambda p: _multiply_first(0, p))),
            ("cls token's position added twice", load(position_embeddings=lambda p: _multiply_first(2, p))),
            ("position rows shifted by one", load(position_embeddings=lambda p: np.roll(p, 1, axis=1))),
            *(("position grid transposed", load(position_embeddings=partial(_transpose, grid=grid))) for grid in grids),
            ("cls token left out", load(cls_token=np.zeros_like)),
            ("cls token last", compute(_put_cls_token_last)),
            ("cls token and its position last", finish(lambda x: np.roll(x, -1, axis=1))),
        ],
        **dict.fromkeys(("norm1", "norm2", "norm"), norm),
        **dict.fromkeys(("attn.query", "attn.key", "attn.value"), projection),
        "attn.probs": [
            ("attention scale left out", multiply(math.sqrt(width), 1)),
            ("attention scale applied twice", multiply(1 / math.sqrt(width), 1)),
            ("attention scale inverted", multiply(width, 1)),
            ("attention scale 1/sqrt(heads)", multiply(math.sqrt(width / heads), 1)),
            ("attention scale 1/sqrt(hidden_size)", multiply(math.sqrt(width / config.hidden_size), 1)),
            ("attention scale 1/sqrt(64)", multiply(math.sqrt(width / 64), 1)),
            ("attention scale head_dim ** -0.25", multiply(width**0.25, 1)),
            ("query and key exchanged", feed(lambda query, key: (key, query))),
            ("softmax over the queries", compute(lambda *args: right.softmax(right.scores(*args), axis=2))),
            ("softmax over the heads", compute(lambda *args: right.softmax(right.scores(*args), axis=1))),
            ("softmax left out", compute(right.scores)),
            ("causal mask", compute(lambda *args: right.softmax(_mask_later(right.scores(*args))))),
        ],
        "attn.context": [
            ("heads merged without moving the axis", finish(regroup(0, 2, 1, 3))),
            ("heads merged in the wrong order", finish(regroup(0, 1, 3, 2))),
            ("attention over the queries", feed(lambda probs, value: (probs.swapaxes(2, 3), value))),
            ("keys used in place of values", read("attn.probs", "attn.key")),
        ],
        "attn.out": [*dense, ("heads merged in the wrong order", feed(regroup(0, 1, 3, 2)))],
        "attn.residual": [*residual, ("residual taken after the norm", read("attn.out", "norm1"))],
        **dict.fromkeys(("mlp.fc1", "mlp.out"), dense),
        "mlp.hidden": [
            ("no activation", compute(lambda layer, x: x)),
            ("activation applied twice", finish(right.ACTIVATIONS[config.hidden_act])),
            *((label, configure(hidden_act=name)) for name, label in NAMED.items()),
        ],
        "mlp.residual": [
            *residual,
            ("residual taken after the norm", read("mlp.out", "norm2")),
            ("residual taken from before the attention", read("mlp.out", "stream")),
        ],
        "logits": [
            *dense,
            ("softmax applied to the logits", finish(right.softmax)),
            ("log_softmax applied to the logits", finish(partial(special.log_softmax, axis=-1))),
            *pooled,
        ],
        "pooler": [
            *dense,
            ("no activation", compute(right.logits)),
            *((label, configure(pooler_act=name)) for name, label in NAMED.items()),
            *pooled,
        ],
        "cls": pooled,
    }


def _normalise(normalise: Callable[[NDArray, float], NDArray]) -> Edit:
    """Replaces a LayerNorm's normalisation, but keeps its scale and bias."""
    return compute(lambda layer, x: right.affine(layer, normalise(x, layer.config.layer_norm_eps)))


def _keep_memory(weight: NDArray) -> NDArray:
    """Returns a kernel (out, in) whose numbers are laid out as in (in, out), unless it is square.

    `safetensors.numpy.save_file` stores a transposed array so. A square kernel is then merely not transposed.
    """
    return weight if weight.shape[0] == weight.shape[1] else weight.T.reshape(weight.shape)


def _keep_patch_memory(weight: NDArray) -> NDArray:
    """Returns a patch kernel (D, C, height, width) whose numbers are laid out as in (height, width, C, D)."""
    return weight.transpose(2, 3, 1, 0).reshape(weight.shape)


def _mix_channels(weight: NDArray) -> NDArray:
    """Returns a patch kernel (D, C, height, width) whose numbers are laid out as if channels came last."""
    return np.moveaxis(weight.reshape(len(weight), *weight.shape[2:], -1), -1, 1)


def _transpose(x: NDArray, grid: tuple[int, int]) -> NDArray:
    """Returns a grid of patches column by column. A cls token before the grid stays."""
    cls, patches = np.split(x, [x.shape[1] - math.prod(grid)], axis=1)
    turned = patches.reshape(len(x), *grid, -1).swapaxes(1, 2)
    return np.concatenate([cls, turned.reshape(patches.shape)], axis=1)


def _multiply_first(factor: float, x: NDArray) -> NDArray:
    return np.concatenate([factor * x[:, :1], x[:, 1:]], axis=1)


def _put_cls_token_last(layer: Layer, patches: NDArray) -> NDArray:
    return np.roll(right.tokens(layer, patches), -1, axis=1) + layer.tensors["position_embeddings"]


def _mask_later(scores: NDArray) -> NDArray:
    return np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)


def list_bugs_at(oracle: NumpyOracle, site: str, known: Mapping[str, NDArray]) -> Iterator[KnownBug]:
    """Yields the known bugs of one site: those in the table, other layers' tensors, and other sites' values.

    Args:
      oracle: the right oracle.
      site: the site's name.
      known: right values of the sites before it.
    """
    (block, kind), own = split(site), oracle.own(site)
    yield from starmap(KnownBug, list_known_bugs(oracle.config)[kind])
    for other in oracle.sites if "weight" in own else ():
        theirs = oracle.own(other)
        if other != site and "weight" in theirs and theirs["weight"].shape == own["weight"].shape:
            yield KnownBug(f"parameters of {other}", _take(theirs, "weight", "bias"))
            yield KnownBug(f"{'kernel' if own['weight'].ndim > 1 else 'scale'} of {other}", _take(theirs, "weight"))
            yield KnownBug(f"bias of {other}", _take(theirs, "bias"))
    if kind in _FUSED:
        three = [oracle.own(block + each) for each in _FUSED]
        heads, width = oracle.config.num_attention_heads, oracle.config.head_dim
        for shape, axis in (((heads, 3, width), 1), ((heads, width, 3), 2)):
            features = np.arange(math.prod(shape)).reshape(shape).take(_FUSED.index(kind), axis).ravel()
            mixed = {leaf: np.concatenate([each[leaf] for each in three])[features] for leaf in own}
            yield KnownBug("fused query, key and value split in the wrong order", _take(mixed, *mixed))
    right_one, *more = oracle.reads(site)
    for name in ("stream", *(name for name, _ in BLOCK_SITES)) if block and not more else ():
        other = oracle.read(site, name)
        if name == kind:
            break
        if other != right_one and known[other].shape == known[right_one].shape:
            skips_norm = ".norm" in right_one and oracle.reads(right_one) == (other,)
            yield KnownBug("input not normalised" if skips_norm else f"input taken from {other}", read(name))


_FUSED = ("attn.query", "attn.key", "attn.value")


def _take(theirs: Tensors, *leaves: str) -> Edit:
    """Takes some tensors from another layer."""

    def taken(layer: Layer) -> Mapping[str, Any]:
        kept = {leaf: tensor for leaf, tensor in layer.tensors.items() if leaf not in leaves}
        return {"tensors": kept | {leaf: theirs[leaf].astype(layer.dtype) for leaf in leaves if leaf in theirs}}

    return equip(taken)


def fit_bugs(
    oracle: NumpyOracle, site: str, known: Mapping[str, NDArray], value: NDArray, truth: NDArray
) -> Iterator[KnownBug]:
    """Yields bugs with a number that follows from the candidate's value: an epsilon, a scale, a branch's factor.

    Args:
      oracle: the right oracle.
      site: the site's name.
      known: right values of the sites before it.
      value: the candidate's value.
      truth: the right value.
    """
    kind = split(site)[1]
    if kind.startswith("norm"):
        own, apart = oracle.own(site), centred(known[oracle.reads(site)[0]])
        variance = np.square(apart).mean(axis=-1)
        # Epsilon weighs most in the row with the least variance.
        row = np.unravel_index(np.argmin(np.where(variance > 0, variance, np.inf)), variance.shape)
        reciprocal = slope(apart[row] * own["weight"], value[row] - own["bias"])
        if reciprocal and (epsilon := float(1 / reciprocal**2 - variance[row])) > 0:
            yield KnownBug(f"LayerNorm epsilon {epsilon:.6g}", configure(layer_norm_eps=epsilon))
    if kind == "attn.probs" and (value > 0).all() and (truth > 0).all():
        times = slope(centred(np.log(truth)), centred(np.log(value)))
        yield KnownBug(f"attention scale {_in_digits(times)} x the right one", multiply(times, 1))
    if kind.endswith("residual"):
        branch, stream = (known[name] for name in oracle.reads(site))
        factor = slope(branch, value - stream)
        yield KnownBug(f"{_in_digits(factor)} x the branch added", multiply(factor, 1))


def _in_digits(factor: float) -> str:
    """Returns a factor with enough digits to differ from 1."""
    return f"{factor:.6g}" if abs(factor - 1) > 1e-5 else f"{factor:.12g}"


def list_roundings(site: str, rounded: Callable[[NDArray], NDArray]) -> Iterator[KnownBug]:
    """Yields products whose operands were rounded first. At a site without a product this changes nothing."""
    operands = equip(lambda layer: {"operand": rounded})
    if split(site)[1] != "attn.probs":
        yield KnownBug("inputs of the product", operands)
    else:
        yield KnownBug("inputs of the scores", operands)
        yield KnownBug("scores", compute(lambda *args: right.softmax(rounded(right.scores(*args)))))
