"""Tests of a candidate's table: what it reads and selects, what it writes back, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import vit_ref
from vit_ref.errors import InputError
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.candidates.loading import find, recognised
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.candidates.table import Table, bind, claimed, counted, fitted, flat, gradients_by_path
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.objectives import objectives_for
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.pairs.outline import DeclaredOutline
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.session import prepare_candidate
from vit_ref.weights import checkpoint
from vit_ref.weights.pretrained import read_configuration

CONFIG = CASES["rectangular"].config
OUTLINE = ViTOutline(CONFIG)
BATCH, TOKENS, HEADS, WIDTH = 2, 17, 3, 33
VALUE = np.arange(BATCH * TOKENS * WIDTH, dtype=np.float32).reshape(BATCH, TOKENS, WIDTH)


def vjp(function: Callable, value: Any) -> tuple[Any, Callable]:
    picked, pull_back = jax.vjp(function, jnp.asarray(value))
    return picked, lambda cotangent: pull_back(cotangent)[0]


def table(mapped: Any) -> Table:
    return Table(mapped, OUTLINE, np.empty((BATCH, *CONFIG.image_hw, 0)), vjp)


class Recording:
    """A tap that records every value, and changes one site."""

    def __init__(self, site: str = "", change: Callable = lambda value: value):
        self.seen: dict[str, Any] = {}
        self.site, self.change = site, change

    def __call__(self, site: str, value: Any) -> Any:
        self.seen[site] = value
        return self.change(value) if site == self.site else value


@pytest.mark.parametrize(
    ("mapped", "message"),
    [
        ({"a": "block.0.attn.qery"}, r"sites: 'a': 'block.0.attn.qery' is none of this model's; did you mean 'block.0"),
        ({"a": "block.7.norm1"}, "'block.7.norm1' is none of this model's"),
        ({"a": "norm", "b": "norm"}, "sites: 'a' and 'b' both claim norm"),
        ({"{i}.a": "block.{i}.norm1", "b": "block.1.norm1"}, "'1.a' and 'b' both claim block.1.norm1"),
        ({"a": ["norm", ("norm", lambda x: x)]}, "both claim norm"),
        (
            {"a{i}": "norm"},
            r"sites: 'a\{i\}': 'norm' has no \{i\}, so every number would mean the same: write \{i\} there",
        ),
        ({"a{i}": ["block.{i}.norm1", ("norm", abs)]}, r"sites: 'a\{i\}': 'norm' has no \{i\}"),
        ({"a": "logitz"}, r"'logitz' is none of this model's; did you mean 'logits'\?"),
        ({"a": "clss"}, "'clss' is none of this model's"),  # this model has no site cls
        ({"a": "logits.mine"}, "'logits.mine' is none of this model's"),
        ({"a:output": "norm"}, "sites: 'a:output' cannot be read: give 'path', 'path:input'"),
        ({"a[0": "norm"}, "cannot be read"),
        (["norm"], "sites: a list: give a dict from its names to the reference's"),
        ({"a": 3}, r"sites: 'a': 3 cannot be read: give a name, \(name, selection\), or a list of these"),
        ({0: "norm"}, "sites: 0: 'norm' cannot be read"),
        ({"a": ("norm", "embeddings")}, r"\('norm', 'embeddings'\) cannot be read"),
        ({"a": (("norm", abs), ("embeddings", abs))}, "or a list of these"),
        ({"a": ("norm", abs, 0)}, "cannot be read"),
    ],
)
def test_an_ambiguous_or_impossible_table_is_refused(mapped: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table(mapped)


def test_a_table_may_name_a_head_that_a_checkpoint_lacks() -> None:
    assert claimed({"head": "logits", "pooler": "pooler", "a": "norm"}, OUTLINE, OUTLINE.shapes(OUTLINE.example)) == {
        "logits",
        "norm",
    }
    assert claimed(None, OUTLINE, {}) == frozenset()


def test_patterns_count_blocks_and_stacked_values_are_split() -> None:
    tap = Recording()
    table({"{i}.a": "block.{i}.norm1"}).at_output("1.a", VALUE, tap)
    assert list(tap.seen) == ["block.1.norm1"]
    stacked = np.stack([VALUE, -VALUE])
    table({"a": "block.{i}.norm1"}).at_name("a", stacked, tap)
    np.testing.assert_array_equal(tap.seen["block.0.norm1"], VALUE)
    np.testing.assert_array_equal(tap.seen["block.1.norm1"], -VALUE)
    table({"a": ("block.{i}.norm1", lambda x: x[..., ::-1])}).at_name("a", stacked, tap)
    np.testing.assert_array_equal(tap.seen["block.1.norm1"], -VALUE[..., ::-1])


@pytest.mark.parametrize(
    ("key", "args", "kwargs"),
    [
        ("a:input", (VALUE, 0), {}),
        ("a:input", (), {"x": VALUE, "y": 0}),
        ("a:input[1]", (0, VALUE), {}),
        ("a:input[x]", (0,), {"x": VALUE}),
    ],
)
def test_a_submodules_arguments_are_shown_and_replaced(key: str, args: tuple, kwargs: dict) -> None:
    tap = Recording("block.0.norm2", np.negative)
    args, kwargs = table({key: "block.0.norm2"}).at_input("a", args, kwargs, tap)
    np.testing.assert_array_equal(tap.seen["block.0.norm2"], VALUE)
    (found,) = (value for value in (*args, *kwargs.values()) if not isinstance(value, int))
    np.testing.assert_array_equal(found, -VALUE)


@pytest.mark.parametrize(
    ("key", "output", "place"), [("a[1]", (0, VALUE), 1), ("a[x]", {"x": VALUE, "y": 0}, "x"), ("a[0]", (VALUE,), 0)]
)
def test_elements_of_an_output_are_shown_and_replaced(key: str, output: Any, place: Any) -> None:
    tap = Recording("norm", np.negative)
    found = table({key: "norm"}).at_output("a", output, tap)
    assert type(found) is type(output) and len(found) == len(output)
    np.testing.assert_array_equal(found[place], -VALUE)


@dataclasses.dataclass
class Encoded:
    """What a submodule returns: values by field."""

    x: Any
    y: int = 0


def test_a_field_of_a_dataclass_is_shown_and_replaced() -> None:
    tap = Recording("norm", np.negative)
    found = table({"a[x]": "norm"}).at_output("a", Encoded(VALUE, 7), tap)
    np.testing.assert_array_equal(tap.seen["norm"], VALUE)
    np.testing.assert_array_equal(found.x, -VALUE)
    assert type(found) is Encoded and found.y == 7


def test_an_argument_or_element_that_is_missing_shows_nothing() -> None:
    tap = Recording("norm", np.negative)
    given = (VALUE,), {"y": VALUE}
    assert table({"a:input[5]": "norm"}).at_input("a", *given, tap) == given
    assert table({"a[3]": "norm"}).at_output("a", (VALUE,), tap)[0] is VALUE
    assert not tap.seen


def test_a_tuple_of_a_declared_reference_stands_for_its_first_element() -> None:
    outline = DeclaredOutline({"norm": VALUE.shape}, (BATCH, 3), {})
    tap = Recording("norm", np.negative)
    first, second = Table({"a": "norm"}, outline, None, vjp).at_output("a", (VALUE, "weights"), tap)
    np.testing.assert_array_equal(first, -VALUE)
    assert second == "weights"


def test_numbers_that_a_declared_reference_does_not_have_are_refused() -> None:
    outline = DeclaredOutline({"layer.0.x": (2, 3)}, (2, 3), {})
    with pytest.raises(
        InputError, match=r"^sites: 'a': 'layers\.\{i\}\.x' is none of this model's; did you mean 'layer\.0"
    ):
        bind({"a": "layers.{i}.x"}, "sites", outline, outline.shapes(None))


def test_a_tuple_output_without_a_chosen_element_is_refused() -> None:
    with pytest.raises(InputError, match=r"sites: norm: there is a tuple: name one of its elements"):
        table({"a": "norm"}).at_output("a", (VALUE, 0), Recording())


def test_a_selection_that_does_not_fit_is_refused() -> None:
    mapped = {"a": ("norm", lambda x: x[0, 0, 0, 0])}
    with pytest.raises(
        InputError, match=r"norm: its selection cannot be applied to a value of shape \(2, 17, 33\): Too"
    ):
        table(mapped).at_output("a", VALUE, Recording())


def test_parts_of_one_value_are_shown_and_replaced_separately() -> None:
    fused = np.concatenate([VALUE, VALUE + 1e4, VALUE + 2e4], axis=-1)
    roles = ("query", "key", "value")
    mapped = {
        "qkv": [
            (f"block.0.attn.{role}", lambda x, k=k: x[..., k * WIDTH : (k + 1) * WIDTH]) for k, role in enumerate(roles)
        ]
    }
    tap = Recording("block.0.attn.key", lambda value: value * 0)
    output = table(mapped).at_output("qkv", fused, tap)
    for k, role in enumerate(roles):
        apart = (VALUE + k * 1e4).reshape(BATCH, TOKENS, HEADS, -1)
        np.testing.assert_array_equal(tap.seen[f"block.0.attn.{role}"], apart)
    expected = fused.copy()
    expected[..., WIDTH : 2 * WIDTH] = 0
    np.testing.assert_array_equal(output, expected)


def test_a_value_shown_after_its_use_counts_as_fixed() -> None:
    beside = table({"a:input": "block.0.attn.residual"})
    beside.at_input("a", (VALUE,), {}, Recording("block.0.attn.residual", np.negative))
    assert beside.fixed == {"block.0.attn.residual"}
    # The input of a module that holds others is the whole stream.
    whole = table({"a:input": "block.0.attn.residual", "a.b": "block.0.norm2"})
    (changed,), _ = whole.at_input("a", (VALUE,), {}, Recording("block.0.attn.residual", np.negative))
    assert whole.fixed == set() and changed is not VALUE
    after = table(None)
    after.returned({"norm": VALUE, "mine": VALUE}, tap := Recording("norm", np.negative))
    assert after.fixed == {"norm"} and list(tap.seen) == ["norm"]


def test_numbers_count_blocks_with_zeros_before_them_or_without() -> None:
    mapped = {"h.block{i}.a": "block.{i}.norm1", "h.block01.b": "norm"}
    assert {path: counted(path) for path in ("block00", "a.007.b10", "v100", "0")} == {
        "block00": "block0",
        "a.007.b10": "a.7.b10",
        "v100": "v100",
        "0": "0",
    }
    tap = Recording()
    table(mapped).returned(flat({"h": {"block00": {"a": VALUE}, "block01": {"a": -VALUE, "b": VALUE}}}), tap)
    assert list(tap.seen) == ["block.0.norm1", "block.1.norm1", "norm"]
    np.testing.assert_array_equal(tap.seen["block.1.norm1"], -VALUE)
    gradients = {"block01.scale": np.ones(33), "block00.scale": np.zeros(33)}
    found = gradients_by_path({"block{i}.scale": "blocks.{i}.norm1.scale"}, OUTLINE, gradients)
    assert found["blocks.1.norm1.scale"].all() and not found["blocks.0.norm1.scale"].any()


class OfNnx(nnx.Module):
    def __init__(self) -> None:
        self.block00 = nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return x.sum((1, 2, 3))[:, None] * self.block00(np.ones((len(x), TOKENS, WIDTH))).sum()


class OfLinen(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x.sum((1, 2, 3))[:, None] * linen.LayerNorm(name="block00")(np.ones((len(x), TOKENS, WIDTH))).sum()


def of_torch() -> Any:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")

    class OfTorch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block00 = torch.nn.LayerNorm(WIDTH)

        def forward(self, x: Any) -> Any:
            return x.sum((1, 2, 3))[:, None] * self.block00(x.new_ones(len(x), TOKENS, WIDTH)).sum()

    return OfTorch()


@pytest.mark.parametrize(
    "load",
    [
        OfNnx,
        lambda: (OfLinen(), {"params": {"block00": {"scale": np.ones(WIDTH), "bias": np.ones(WIDTH)}}}),
        pytest.param(of_torch, marks=pytest.mark.torch),
    ],
    ids=["nnx", "linen", "torch"],
)
@pytest.mark.parametrize("key", ["block{i}", "block00"])
def test_submodules_may_be_numbered_with_zeros(load: Callable[[], Any], key: str, saved: Callable[[str], Path]) -> None:
    source = checkpoint.read(saved("one-block"))
    candidate = vit_ref.Candidate(load=lambda _: load(), sites={key: "block.{i}.norm1" if "{" in key else "norm"})
    model = prepare_candidate(candidate, read_configuration(source), source)
    found = model.trace(CASES["rectangular"].images(), FLOAT64)
    assert found.keys() == {"block.0.norm1" if "{" in key else "norm", "logits"}
    assert any(name.startswith("block0.") for name in model.parameters())


def test_only_neighbouring_axes_are_merged_or_split() -> None:
    apart = VALUE.reshape(BATCH, TOKENS, HEADS, -1)
    np.testing.assert_array_equal(fitted(apart, VALUE.shape), VALUE)
    np.testing.assert_array_equal(fitted(VALUE, apart.shape), apart)
    np.testing.assert_array_equal(fitted(VALUE[0], (1, TOKENS, WIDTH)), VALUE[:1])
    # A reshape would give the wanted shape, but with the elements in wrong places.
    moved = apart.swapaxes(1, 2)
    assert fitted(moved, apart.shape) is moved
    assert fitted(VALUE.swapaxes(1, 2), VALUE.shape).shape == (BATCH, WIDTH, TOKENS)
    assert fitted(VALUE, (BATCH, TOKENS, WIDTH + 1)) is VALUE


def test_gradients_are_named_and_shaped_by_the_table() -> None:
    ours = {"w": ("head.kernel", lambda w: w.T), "b": "head.bias", "q": "blocks.{i}.attn.query.bias"}
    gradients = {"w": np.ones((23, 33)), "b": np.zeros(23), "q": np.stack([np.zeros((3, 11)), np.ones((3, 11))])}
    found = gradients_by_path(ours, OUTLINE, gradients)
    assert {path: value.shape for path, value in found.items()} == {
        "head.kernel": (33, 23),
        "head.bias": (23,),
        "blocks.0.attn.query.bias": (33,),
        "blocks.1.attn.query.bias": (33,),
    }
    assert found["blocks.1.attn.query.bias"].all() and not found["blocks.0.attn.query.bias"].any()
    with pytest.raises(InputError, match=r"parameters: there is no parameter 'wight'; did you mean 'weight'\?"):
        gradients_by_path({"wight": "norm.scale"}, OUTLINE, {"weight": np.ones(33)})
    with pytest.raises(InputError, match=r"'w': 'head.kernal' is none of this model's; did you mean 'head.kernel'\?"):
        bind({"w": "head.kernal"}, "parameters", OUTLINE, {"head.kernel": ()})


def test_one_table_serves_models_with_and_without_a_head() -> None:
    mapped = {"w": "head.kernel", "{i}.q": "blocks.{i}.attn.query.bias", "s": "norm.scale"}
    bare = dataclasses.replace(CONFIG, num_labels=0, qkv_bias=False)
    assert list(gradients_by_path(mapped, ViTOutline(bare), {"s": np.ones(33)})) == ["norm.scale"]
    with pytest.raises(InputError, match=r"'blocks.9.attn.query.bias' is none of this model's"):
        gradients_by_path({"q": "blocks.9.attn.query.bias"}, ViTOutline(bare), {"s": np.ones(33)})
    with pytest.raises(InputError, match=r"there is no parameter 'w'"):
        gradients_by_path(mapped, OUTLINE, {"s": np.ones(33)})


def test_gradients_with_known_names_need_no_table() -> None:
    nothing = vit_ref.Candidate(load=print)
    shapes = list_parameters(CONFIG)
    assert recognised(nothing, OUTLINE, CASES["rectangular"].checkpoint().tensors).keys() == shapes.keys()
    own = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    assert recognised(nothing, OUTLINE, own).keys() == shapes.keys()
    assert recognised(nothing, OUTLINE, {"my.weight": np.ones(3)}) == {}


def reordered(spec: str) -> vit_ref.Candidate:
    """The tutorial's candidate with a selection that it does not need: it moves axes and moves them back."""
    found = find(spec)
    sites = dict(found.sites or {})
    sites["encoder.layers.{i}.attention.query"] = ("block.{i}.attn.query", lambda x: x[:, :, ::-1][:, :, ::-1])
    return vit_ref.Candidate(load=found.load, sites=sites, parameters=found.parameters)


@pytest.mark.parametrize(
    ("file", "changed"), [("nnx_tutorial.py", reordered), pytest.param("torch_timm.py", find, marks=pytest.mark.torch)]
)
def test_a_selection_replaces_and_perturbs_the_inner_value(
    file: str, changed: Callable[[str], vit_ref.Candidate], locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    source = checkpoint.read(saved("one-block"))
    config = read_configuration(source)
    pixels = CASES["rectangular"].images()[:2]
    own = OwnCandidate(config, source)
    theirs = prepare_candidate(changed(locate(file)), config, source)
    rng = np.random.default_rng(0)
    values = {
        f"block.0.attn.{role}": rng.normal(size=(2, TOKENS, HEADS, WIDTH // HEADS)) for role in ("query", "value")
    }
    expected = own.trace(pixels, FLOAT64, replace=values)["logits"]
    found = theirs.trace(pixels, FLOAT64, replace=values)["logits"]
    assert error(found, expected).rms < SEMANTIC_RMS
    objective = objectives_for((len(pixels), config.num_labels))[1]
    pulled = own.gradients(pixels, FLOAT64)(objective).sites
    back = theirs.gradients(pixels, FLOAT64)(objective).sites
    assert values.keys() <= back.keys() <= pulled.keys()
    assert max(error(back[site], pulled[site]).rms for site in back) < SEMANTIC_RMS
