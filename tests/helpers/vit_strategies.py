"""Hypothesis strategies for valid configurations, and for invalid ones with their exact error.

They draw a configuration and plain integers, so that a failing example prints as code to paste. Weights, images and
permutations follow from a seed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from vit_ref.model.config import ACTIVATION_NAMES, ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.cases import Case
from vit_ref.weights.layouts import BIG_VISION, HF, TIMM, Layout
from vit_ref.weights.mapping import Tensors, port

seeds = st.integers(0, 2**16)
indices = st.integers(0, 255)


def times(factor: int) -> settings:
    """Multiplies the number of the profile's examples, and shrinks in any profile. For tests that compile nothing."""
    return settings(max_examples=factor * settings.default.max_examples, phases=tuple(Phase))


@st.composite
def configs(draw: st.DrawFn, *, min_width: int = 1, min_patches: int = 1, max_blocks: int = 2) -> ViTConfig:
    """Draws valid configurations: rectangular, odd and prime sizes, down to one head, block, patch and width one.

    Args:
      draw: hypothesis's function.
      min_width: the least `hidden_size`.
      min_patches: the least number of patches.
      max_blocks: the largest `num_hidden_layers`.
    """
    heads = draw(st.sampled_from((1, 2, 3, 5)))
    head_dim = draw(st.sampled_from([size for size in (1, 2, 3, 5, 8) if heads * size >= min_width]))
    rows = draw(st.integers(1, 4))
    columns = draw(st.integers(-(-min_patches // rows), 5))
    patch = draw(st.sampled_from((1, 2, 3, 5))), draw(st.sampled_from((1, 2, 3, 5)))
    end = draw(st.sampled_from(("head", "pooler", "neither")))
    return ViTConfig(
        hidden_size=heads * head_dim,
        num_hidden_layers=draw(st.integers(1, max_blocks)),
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from((1, 2, 7, 11, 16))),
        hidden_act=draw(st.sampled_from(ACTIVATION_NAMES)),
        layer_norm_eps=draw(st.sampled_from((1e-12, 1e-6, 1e-2))),
        qkv_bias=draw(st.booleans()),
        # Dropout does nothing in evaluation mode, whatever the rates.
        hidden_dropout_prob=draw(st.sampled_from((0.0, 0.1, 0.5))),
        attention_probs_dropout_prob=draw(st.sampled_from((0.0, 0.2))),
        image_size=(rows * patch[0], columns * patch[1]),
        patch_size=patch,
        num_channels=draw(st.integers(1, 8)),
        num_labels=draw(st.integers(1, 7)) if end == "head" else 0,
        pooler=end == "pooler",
        pooler_output_size=draw(st.none() | st.integers(1, 7)),
        pooler_act=draw(st.sampled_from(ACTIVATION_NAMES)),
    )


@st.composite
def square_configs(draw: st.DrawFn) -> ViTConfig:
    """Draws configurations of at least two blocks in which every dense kernel and every patch is square.

    Then no shape shows a transposed kernel or an exchanged layer. The activation is GELU, because under ReLU a layer of
    few units may be dead, and its weights without effect.
    """
    config = draw(configs(min_width=5))
    rows, columns = config.grid()
    side = draw(st.integers(2, 3))
    return dataclasses.replace(
        config,
        num_hidden_layers=draw(st.integers(2, 3)),
        intermediate_size=config.hidden_size,
        hidden_act="gelu",
        pooler_act="gelu",
        image_size=(rows * side, columns * side),
        patch_size=side,
        num_labels=config.hidden_size if config.num_labels else 0,
        pooler_output_size=None,
    )


def _not_integers(least: int) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.integers(max_value=least - 1), st.booleans(), st.floats(), st.text(max_size=3), st.tuples(st.integers(1, 3))
    )


_NOT_BOOLEANS = st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none())
_NOT_NUMBERS = st.sampled_from((math.nan, math.inf, -math.inf, True, False, "0.1", None, (0.1,)))


def _one_field(name: str, values: st.SearchStrategy[Any], message: str) -> st.SearchStrategy[tuple[dict, str]]:
    return st.builds(
        lambda config, value: ({**fields(config), name: value}, f"{name} is {value!r}: {message}"), configs(), values
    )


def fields(config: ViTConfig) -> dict[str, Any]:
    """Returns the keyword arguments that make `config`."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@st.composite
def _headed_astray(draw: st.DrawFn) -> tuple[dict, str]:
    config = draw(configs())
    heads = draw(st.integers(2, 9))
    width = heads * draw(st.integers(0, 9)) + draw(st.integers(1, heads - 1))
    wrong = {**fields(config), "hidden_size": width, "num_attention_heads": heads}
    return wrong, f"hidden_size {width} is not a multiple of num_attention_heads {heads}: change one of them"


@st.composite
def _cut_patches(draw: st.DrawFn, axis: int) -> tuple[dict, str]:
    config = draw(configs())
    name = ("height", "width")[axis]
    image, patch = list(config.image_hw), list(config.patch_hw)
    patch[axis] = draw(st.integers(2, 9))
    image[axis] = patch[axis] * draw(st.integers(0, 5)) + draw(st.integers(1, patch[axis] - 1))
    wrong = {**fields(config), "image_size": tuple(image), "patch_size": patch}
    return wrong, f"image {name} {image[axis]} is not a multiple of the patch {name} {patch[axis]}: change it"


@st.composite
def _pooled_classifier(draw: st.DrawFn) -> tuple[dict, str]:
    return {**fields(draw(configs())), "num_labels": draw(st.integers(1, 9)), "pooler": True}, (
        "pooler and num_labels are both set, and the reference's classifiers have no pooler: set pooler=False"
        " or num_labels=0"
    )


@st.composite
def _miscounted_labels(draw: st.DrawFn) -> tuple[dict, str]:
    config = draw(configs())
    labels = draw(st.lists(st.text(max_size=3), min_size=1, max_size=9).filter(lambda x: len(x) != config.num_labels))
    message = f"there are {len(labels)} labels and num_labels is {config.num_labels}: give one name per class"
    return {**fields(config), "labels": labels}, message


def _whole(least: int, most: int = 2**20) -> str:
    return f"give an integer of at least {least} and at most {most}"


_SIDES = "give a positive integer of at most 1048576, or (height, width)"
_NOT_SIDES = st.one_of(
    _not_integers(1), st.none(), st.tuples(st.integers(1, 9), _not_integers(1)), st.lists(st.just(4), min_size=3)
)
_KNOWN = "give one of gelu, gelu_new, gelu_python, gelu_pytorch_tanh, quick_gelu, relu, silu, swish, tanh"
_NOT_ACTIVATIONS = st.one_of(st.text(max_size=9), st.sampled_from(("GELU", "mish", "gelu ", None, 3))).filter(
    lambda name: name not in ACTIVATION_NAMES
)
_NOT_PROBABILITIES = st.one_of(_NOT_NUMBERS, st.floats(min_value=1), st.floats(max_value=0, exclude_max=True))
_NOT_POSITIVE = st.one_of(_NOT_NUMBERS, st.floats(max_value=0))

# Field or contradiction at fault -> keyword arguments of a configuration, and the message of its error.
INVALID: dict[str, st.SearchStrategy[tuple[dict, str]]] = {
    **{
        name: _one_field(name, _not_integers(1) | st.none(), _whole(1, 1024 if name == "num_hidden_layers" else 2**20))
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "num_channels",
        )
    },
    "num_labels": _one_field("num_labels", _not_integers(0) | st.none(), _whole(0)),
    "pooler_output_size": _one_field("pooler_output_size", _not_integers(1), _whole(1)),
    **{name: _one_field(name, _NOT_SIDES, _SIDES) for name in ("image_size", "patch_size")},
    **{name: _one_field(name, _NOT_ACTIVATIONS, _KNOWN) for name in ("hidden_act", "pooler_act")},
    **{
        name: _one_field(name, _NOT_PROBABILITIES, "give a probability, 0 <= p < 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
    },
    **{
        name: _one_field(name, _NOT_POSITIVE, "give a positive number")
        for name in ("layer_norm_eps", "initializer_range")
    },
    **{name: _one_field(name, _NOT_BOOLEANS, "give true or false") for name in ("qkv_bias", "pooler")},
    "hidden_size and num_attention_heads": _headed_astray(),
    "image and patch height": _cut_patches(0),
    "image and patch width": _cut_patches(1),
    "pooler and num_labels": _pooled_classifier(),
    "labels and num_labels": _miscounted_labels(),
}


def weights(config: ViTConfig, seed: int) -> dict[str, NDArray]:
    """Returns random parameters by path, float32, none at its initial value."""
    return port(Case("random", config, seed=seed).checkpoint().tensors, config, HF)


def random_bits(config: ViTConfig, dtype: DTypeLike, seed: int = 0) -> dict[str, NDArray]:
    """Returns parameters by path with random finite bits, denormal numbers and negative zeros among them."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    values = {}
    for path, shape in list_parameters(config).items():
        value = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=f"u{dtype.itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):
            values[path] = np.where(np.isfinite(value), value, dtype.type(-0.0))
    return values


def within(layout: Layout, config: ViTConfig) -> ViTConfig:
    """Returns the configuration, without a pooler if the layout has no name for one."""
    return dataclasses.replace(config, pooler=False) if layout is TIMM else config


def with_room(layout: Layout, parameters: Tensors) -> dict[str, NDArray]:
    """Returns the parameters, with zero for the cls token's position if the layout cannot store it."""
    fitting = dict(parameters)
    if layout is BIG_VISION:
        fitting["position_embeddings"] = fitting["position_embeddings"].copy()
        fitting["position_embeddings"][:, 0] = 0
    return fitting


def random_cycle(length: int, seed: int) -> NDArray:
    """Draws a permutation of `range(length)` that moves everything, if there is more than one position."""
    order = np.random.default_rng(seed).permutation(length)
    cycle = np.empty(length, int)
    cycle[order] = np.roll(order, 1)
    return cycle
