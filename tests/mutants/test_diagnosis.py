"""Does the diagnosis name known bugs at every kind of site, and nothing when it knows nothing?

For a bug in the weights or images, the NumPy oracle with those computes what a candidate with the bug would show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.diagnose.diagnosis import (
    Cause,
    beyond_rounding,
    diagnose,
    diagnose_gradient,
    diagnose_rounding,
    where,
)
from vit_ref.verify.diagnose.gaps import explain_across
from vit_ref.verify.gates import error
from vit_ref.verify.problem import hidden_before
from vit_ref.verify.references.numpy_oracle import NumpyOracle


def two_blocks(name: str, **fields: Any) -> ViTConfig:
    return dataclasses.replace(CASES[name].config, num_hidden_layers=2, **fields)


SQUARE = Case("square", two_blocks("pooler", pooler_output_size=None, image_size=15), batch=2)
ONE_HEAD = Case("one-head", two_blocks("one-head"), seed=4)
SUBJECTS = {case.name: case for case in (CASES["rectangular-patch"], ONE_HEAD, SQUARE)}


class Known:
    """A case with its weights and images, and the right values."""

    def __init__(self, case: Case):
        self.config, self.tensors, self.images = case.config, case.checkpoint().tensors, case.images()
        self.truth = NumpyOracle(self.config, self.tensors).trace(self.images)

    def causes(self, site: str, value: NDArray) -> list[str]:
        shown = {**self.truth, site: value}
        found = diagnose(self.config, self.tensors, self.images, self.truth, list(self.truth), site, shown)
        return [cause.label for cause in found]


@pytest.fixture(scope="module", params=SUBJECTS)
def known(request: pytest.FixtureRequest) -> Known:
    return Known(SUBJECTS[request.param])


def test_at_every_site_a_factor_is_named_and_noise_is_not(known: Known) -> None:
    rng = np.random.default_rng(0)
    for site in sites(known.config, len(known.images)):
        right = known.truth[site.name]
        assert known.causes(site.name, 3 * right) == ["3 x the reference"], site.name
        noise = 1 + 1e-3 * rng.normal(size=site.shape)
        assert known.causes(site.name, right * noise) == [], site.name
        assert known.causes(site.name, right[..., :-1]) == known.causes(site.name, right * np.nan) == [], site.name


def upside_down(tensor: NDArray) -> NDArray:
    return tensor[:, :, ::-1]


def in_jax_memory(tensor: NDArray) -> NDArray:
    """Returns what a reader finds after safetensors' NumPy writer stored a transposed view of jax's kernel."""
    kernel = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    return np.frombuffer(kernel.tobytes(), kernel.dtype).reshape(tensor.shape)


def turned(tensor: NDArray) -> NDArray:
    return tensor[:, :, ::-1, ::-1]


@pytest.mark.parametrize(
    ("name", "change", "site", "label"),
    [
        ("embeddings.patch_embeddings.projection.weight", upside_down, "patches", "patch kernel upside down"),
        ("embeddings.patch_embeddings.projection.weight", turned, "patches", "patch kernel rotated by 180 degrees"),
        (
            "embeddings.patch_embeddings.projection.weight",
            in_jax_memory,
            "patches",
            "patch kernel saved with the memory of its transpose",
        ),
        ("pooler.dense.weight", np.transpose, "pooler", "kernel not transposed"),
        ("pooler.dense.bias", np.zeros_like, "pooler", "bias left out"),
        ("layernorm.weight", np.ones_like, "norm", "LayerNorm without scale"),
        ("layernorm.weight", lambda scale: 1 + np.float64(scale), "norm", "one added to the norm's scale"),
        ("embeddings.cls_token", np.zeros_like, "embeddings", "cls token left out"),
    ],
)
def test_a_bug_in_the_weights_is_named(name: str, change: Callable[[NDArray], NDArray], site: str, label: str) -> None:
    known = Known(SQUARE)
    wrong = NumpyOracle(known.config, {**known.tensors, name: change(known.tensors[name])}).trace(known.images)
    assert known.causes(site, wrong[site]) == [label]


def test_rounded_parameters_of_a_norm_are_named() -> None:
    known = Known(SQUARE)
    names = ("layernorm.weight", "layernorm.bias")
    rounded = {name: known.tensors[name].astype(ml_dtypes.bfloat16).astype(np.float32) for name in names}
    wrong = NumpyOracle(known.config, {**known.tensors, **rounded}).trace(known.images)
    assert known.causes("norm", wrong["norm"]) == ["parameters rounded to bfloat16"]


def test_a_softmax_of_the_logits_is_named() -> None:
    known = Known(CASES["rectangular"])
    logits = known.truth["logits"] + 1000  # float64 cannot hold their exponentials
    known.truth["logits"] = logits
    known.tensors = {**known.tensors, "classifier.bias": known.tensors["classifier.bias"].astype(np.float64) + 1000}
    normalised = logits - np.log(np.exp(logits - 1000).sum(axis=-1, keepdims=True)) - 1000
    assert known.causes("logits", np.exp(normalised)) == ["softmax applied to the logits"]
    assert known.causes("logits", normalised) == ["log_softmax applied to the logits"]


def test_without_a_head_a_token_other_than_cls_is_named() -> None:
    known = Known(CASES["headless"])
    norm = known.truth["norm"]
    assert known.causes("cls", norm[:, 1:].mean(axis=1)) == ["mean of the patches pooled"]
    assert known.causes("cls", norm[:, -1]) == ["last token pooled"]


@pytest.mark.parametrize(
    ("change", "label"),
    [
        (lambda images: images.swapaxes(1, 2), "images transposed"),
        (lambda images: images[:, ::-1], "images upside down"),
        (lambda images: images[:, :, ::-1], "images mirrored"),
    ],
)
def test_images_that_are_turned_are_named(change: Callable[[NDArray], NDArray], label: str) -> None:
    known = Known(SQUARE)
    wrong = NumpyOracle(known.config, known.tensors).trace(change(known.images))
    assert known.causes("patches", wrong["patches"]) == [label]


@pytest.mark.parametrize(("site", "branch"), [("attn.residual", "attn.out"), ("mlp.residual", "mlp.out")])
def test_a_branch_that_is_scaled_is_named(site: str, branch: str) -> None:
    """LayerScale keeps its initial value. A branch twice as large has its own label."""
    known = Known(CASES["rectangular"])
    right, added = (known.truth[f"block.1.{kind}"] for kind in (site, branch))
    assert known.causes(f"block.1.{site}", right - 0.9 * added) == ["0.1 x the branch added"]
    assert known.causes(f"block.1.{site}", right + added) == ["branch added twice"]


def test_heads_of_a_fused_product_are_split_at_either_end() -> None:
    known, site = Known(CASES["rectangular"]), "block.1.attn.key"
    fused = np.concatenate([known.truth[site.replace("key", role)] for role in ("query", "key", "value")], axis=2)
    flat = fused.reshape(*fused.shape[:2], -1)
    heads, width = known.truth[site].shape[2:]
    for wrong in (
        flat.reshape(*fused.shape[:2], heads, 3, width)[:, :, :, 1],
        flat.reshape(*fused.shape[:2], heads, width, 3)[..., 1],
    ):
        assert known.causes(site, wrong) == ["fused query, key and value split in the wrong order"]


ORDERS = {
    "block.1.attn.query": (2, "head", [2, 0, 1], "2, 0, 1"),
    "block.0.mlp.hidden": (2, "channel", [1, 0, 3, 2], "1, 0, 3, 2, ..."),
    "embeddings": (1, "token", [0, 2, 1, 4, 3], "0, 2, 1, 4, ..."),
    "logits": (1, "channel", [3, 1, 2, 0], "3, 1, 2, 0, ..."),
}


@pytest.mark.parametrize("site", ORDERS)
def test_another_order_along_an_axis_is_named(site: str) -> None:
    known, (axis, name, first, said) = Known(CASES["rectangular"]), ORDERS[site]
    right = known.truth[site]
    order = [*first, *range(len(first), right.shape[axis])]
    wrong = np.take(right, order, axis)
    assert known.causes(site, wrong) == [f"another order along the {name} axis ({said})"]
    # Two elements in one position are not an order, and another error beside the order is not explained by it.
    assert known.causes(site, np.take(right, [order[0], *order[:-1]], axis)) == []
    assert known.causes(site, wrong * (1 + 1e-6 * np.arange(right.shape[-1]))) == []


@pytest.mark.parametrize("epsilon", [3e-4, 1.00001e-12])
def test_any_epsilon_is_named(known: Known, epsilon: float) -> None:
    """The tokens vary little. With a variance of one, an epsilon of 1e-17 is below any rounding."""
    config = dataclasses.replace(known.config, layer_norm_eps=1e-12)
    tensors = {
        name: value * np.float32(1e-6) if "embeddings" in name else value for name, value in known.tensors.items()
    }
    truth = NumpyOracle(config, tensors).trace(known.images)
    wrong = NumpyOracle(dataclasses.replace(config, layer_norm_eps=epsilon), tensors).trace(known.images)
    site = "block.0.norm1"
    found = diagnose(config, tensors, known.images, truth, list(truth), site, {**truth, site: wrong[site]})
    assert [cause.label for cause in found] == [f"LayerNorm epsilon {epsilon:g}"]


@pytest.mark.parametrize("times", [0.3, 1.0000001])
def test_any_scale_of_the_scores_is_named(known: Known, times: float) -> None:
    query, key = (known.truth[f"block.1.attn.{role}"] for role in ("query", "key"))
    probs = np.exp(times / np.sqrt(known.config.head_dim) * np.einsum("bqhk,bmhk->bhqm", query, key))
    found = known.causes("block.1.attn.probs", probs / probs.sum(-1, keepdims=True))
    assert found == [f"attention scale {times} x the right one"]


def test_rounding_does_not_explain_a_larger_error() -> None:
    known, site = Known(CASES["rectangular"]), "block.0.mlp.hidden"
    for value, causes in ((known.truth[site], ["rounded to float32"]), (known.truth[site] * 1.001 + 1e-3, [])):
        assert known.causes(site, value.astype(np.float32).astype(np.float64)) == causes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("", [])),
        ({"hidden_act": "gelu_new"}, ("block.0.mlp.hidden", ["tanh GELU"])),
        ({"layer_norm_eps": 1e-2}, ("block.0.norm1", ["LayerNorm epsilon 1e-02"])),
    ],
)
@pytest.mark.parametrize("unseen", [(), ("block.0.attn.probs", "block.0.mlp.fc1")])
def test_a_wrong_formula_behind_a_rounding_is_found(
    changes: dict[str, object], expected: tuple[str, list[str]], unseen: tuple[str, ...]
) -> None:
    """Every value is rounded to float32, as in a candidate whose layers carry that dtype, and one formula is wrong."""
    known = Known(CASES["rectangular"])
    oracle = NumpyOracle(dataclasses.replace(known.config, **changes), known.tensors)
    wrong: dict[str, NDArray] = {}
    for site in known.truth:
        right = oracle.value(site, known.images, wrong)
        wrong[site] = right.astype(np.float32).astype(np.float64)
    shown = {site: value for site, value in wrong.items() if site not in unseen}
    names = list(known.truth)
    (first,) = diagnose(known.config, known.tensors, known.images, known.truth, names, "patches", shown)
    assert (first.label, first.format) == ("rounded to float32", "float32")
    site, off, causes = beyond_rounding(known.config, known.tensors, known.images, names, first, shown)
    assert (site, [cause.label for cause in causes]) == expected
    assert (off > 1e-5) == bool(site)


def test_a_value_not_finite_behind_a_rounding_is_found() -> None:
    known, site = Known(CASES["rectangular"]), "block.1.norm1"
    rounded = Cause("rounded to float32", "patches", 1e-8, 0.0, "float32")
    shown = {**known.truth, site: known.truth[site] * np.nan}
    found = beyond_rounding(known.config, known.tensors, known.images, list(known.truth), rounded, shown)
    assert found == (site, np.inf, ())


def test_a_wrong_shape_behind_a_rounding_is_found() -> None:
    known, site = Known(CASES["rectangular"]), "block.0.mlp.hidden"
    rounded = Cause("rounded to float32", "patches", 1e-8, 0.0, "float32")
    names, shown = list(known.truth), {**known.truth, site: known.truth[site][..., :-1]}
    found = beyond_rounding(known.config, known.tensors, known.images, names, rounded, shown)
    assert found == (site, np.inf, ())
    # This site is further back than the wrong value before it.
    shown["block.0.attn.query"] = shown["block.0.attn.query"] * 1.5
    found = beyond_rounding(known.config, known.tensors, known.images, names, rounded, shown)
    assert (found[0], [cause.label for cause in found[2]]) == ("block.0.attn.query", ["1.5 x the reference"])


def test_one_wrong_element_is_no_factor() -> None:
    known = Known(CASES["rectangular"])
    for count, causes in ((1, []), (2, ["1.5 x the reference"])):
        wrong = known.truth["logits"].copy()
        wrong[1, :count] *= 1.5
        assert known.causes("logits", wrong) == causes


def test_one_wrong_head_is_placed_and_explained() -> None:
    known = Known(CASES["rectangular"])
    site = "block.1.attn.value"
    wrong = known.truth[site].copy()
    wrong[:, :, 2] *= 1.5
    assert known.causes(site, wrong) == ["1.5 x the reference"]
    assert where(wrong, known.truth[site], site) == "only at head 2 of 3"
    assert where(known.truth[site], known.truth[site], site) == ""
    assert where(wrong[..., 0], known.truth[site], site) == f"shape {wrong.shape[:-1]}, not {wrong.shape}"
    assert where(wrong * np.nan, known.truth[site], site) == "because it is not finite"


def test_a_bug_in_one_image_is_named_unless_another_has_another() -> None:
    known, site = Known(CASES["rectangular"]), "block.1.mlp.hidden"
    tanh, relu = (
        NumpyOracle(dataclasses.replace(known.config, hidden_act=name), known.tensors).value(
            site, known.images, {"block.1.mlp.fc1": known.truth["block.1.mlp.fc1"]}
        )
        for name in ("gelu_new", "relu")
    )
    wrong = known.truth[site].copy()
    wrong[2] = relu[2]
    assert known.causes(site, wrong) == ["ReLU"]
    wrong[3] = tanh[3]
    assert known.causes(site, wrong) == []


PRODUCTS = {
    "block.0.attn.out": ("block.0.attn.context", "encoder.layer.0.attention.output.dense"),
    "block.1.mlp.fc1": ("block.1.norm2", "encoder.layer.1.intermediate.dense"),
    "logits": ("norm", "classifier"),
}


@pytest.mark.parametrize(
    ("dtype", "label"), [(ml_dtypes.bfloat16, "bfloat16"), (np.float16, "ten bits of mantissa (TF32, float16)")]
)
def test_products_of_rounded_inputs_are_named(dtype: type, label: str) -> None:
    known = Known(CASES["rectangular"])
    tensors = {name.removeprefix("vit."): tensor for name, tensor in known.tensors.items()}
    trace = {site: value.astype(np.float32) for site, value in known.truth.items()}

    def narrow(x: NDArray) -> NDArray:
        return x.astype(np.float32).astype(dtype).astype(np.float64)

    def causes(site: str, value: NDArray) -> list[str]:
        shown = {**trace, site: value.astype(np.float32)}
        return [str(c.label) for c in diagnose_rounding(known.config, known.tensors, site, shown, known.truth)]

    for site, (before, name) in PRODUCTS.items():
        x = trace[before][:, 0] if site == "logits" else trace[before]
        product = narrow(x) @ narrow(tensors[f"{name}.weight"]).T + tensors[f"{name}.bias"]
        assert causes(site, product) == [f"inputs of the product rounded to {label}"], site
    query, key, value, probs = (narrow(trace[f"block.0.attn.{kind}"]) for kind in ("query", "key", "value", "probs"))
    context = np.einsum("bhqm,bmhk->bqhk", probs, value).reshape(trace["block.0.attn.context"].shape)
    assert causes("block.0.attn.context", context) == [f"inputs of the product rounded to {label}"]
    scores = np.exp(np.einsum("bqhk,bmhk->bhqm", query, key) / np.sqrt(known.config.head_dim))
    probs = scores / scores.sum(-1, keepdims=True)
    assert causes("block.0.attn.probs", probs) == [f"inputs of the scores rounded to {label}"]
    assert causes("block.0.mlp.hidden", trace["block.0.mlp.hidden"] * np.float32(1.001)) == []
    assert causes("block.0.mlp.hidden", trace["block.0.mlp.hidden"] * np.nan) == []


def test_a_gradient_that_cannot_be_compared_has_no_cause() -> None:
    truth = np.random.default_rng(0).normal(size=(2, 3))
    assert [cause.label for cause in diagnose_gradient(truth, "norm", 2 * truth)] == ["2 x the reference"]
    assert [cause.label for cause in diagnose_gradient(truth, "norm", 0 * truth)] == ["all zero"]
    assert diagnose_gradient(0 * truth, "norm", truth) == ()
    assert diagnose_gradient(truth, "norm", truth[:1]) == diagnose_gradient(truth, "norm", truth * np.nan) == ()


def hidden_causes(known: Known, other: dict[str, object], shown: tuple[str, ...]) -> list[str]:
    """Returns the causes for another configuration that shows only these sites and those before the first."""
    wrong = NumpyOracle(dataclasses.replace(known.config, **other), known.tensors).trace(known.images)
    names = list(known.truth)
    before = {name: known.truth[name] for name in names[: names.index("block.0.mlp.fc1")]} if len(shown) > 1 else {}
    exact = {**before, **{site: wrong[site] for site in shown}}
    site = next(site for site in shown if not np.array_equal(wrong[site], known.truth[site]))
    found = diagnose(known.config, known.tensors, known.images, known.truth, names, site, exact)
    # The report shows this number above it, though only one image was tried.
    assert all(cause.before == error(wrong[site], known.truth[site]).rms for cause in found)
    return [cause.label for cause in found]


def test_a_cause_is_found_at_a_site_that_is_not_shown() -> None:
    known = Known(CASES["rectangular-patch"])
    tanh = {"hidden_act": "gelu_new"}
    assert hidden_causes(known, tanh, ("block.0.mlp.out", "logits")) == ["tanh GELU, at block.0.mlp.hidden"]


def test_a_cause_is_found_where_the_output_alone_is_shown() -> None:
    known = Known(CASES["rectangular-patch"])
    assert hidden_causes(known, {"hidden_act": "gelu_new"}, ("logits",)) == ["tanh GELU throughout"]
    both = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-6}
    assert hidden_causes(known, both, ("logits",)) == ["quick GELU and LayerNorm epsilon 1e-06 throughout"]
    assert hidden_causes(known, {"layer_norm_eps": 3e-4}, ("logits",)) == []


def test_hidden_sites_end_at_the_last_shown_one() -> None:
    names = ["patches", "embeddings", "block.0.norm1", "block.0.attn.query"]
    assert hidden_before("block.0.attn.query", names, {"patches": 0}) == ("embeddings", "block.0.norm1")
    assert hidden_before("block.0.norm1", names, {"embeddings": 0}) == ()
    assert hidden_before("embeddings", names, {}) == ("patches",)


def test_a_gap_of_one_block_is_tried_site_by_site_and_then_throughout() -> None:
    known = Known(CASES["rectangular"])
    gap = ("block.1.attn.out", "block.1.attn.residual")
    oracle, right = NumpyOracle(known.config, known.tensors), {site: x[:1] for site, x in known.truth.items()}
    labels = [each.label for each in explain_across(oracle, "block.1.norm2", known.images[:1], right, gap)]
    last = max(k for k, label in enumerate(labels) if label.endswith(f"at {gap[-1]}"))
    assert labels[last + 1].endswith(" throughout")
    assert {label.rpartition(" at ")[2] for label in labels[: last + 1]} == set(gap)
