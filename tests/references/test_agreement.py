"""Do the references agree with each other, and would a wrong observation of PyTorch's be noticed?"""

from __future__ import annotations

import contextlib
from functools import cache
from itertools import combinations

import ml_dtypes
import numpy as np
import pytest
from jax.typing import DTypeLike

from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError, ReferenceUnavailableError, UnsupportedByReferenceError
from vit_ref.model.sites import BLOCK_SITES, sites
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.backward import truths_of
from vit_ref.verify.compare.objectives import objectives_for
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.gates import error, errors_of, numerical_gate
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.references import torch_vit
from vit_ref.verify.references.choice import REFERENCES, reference_for, require, with_fused_attention
from vit_ref.verify.references.torch_vit import TorchViTReference
from vit_ref.verify.report import headline, table
from vit_ref.verify.session import Session

pytestmark = pytest.mark.torch

SMALL = [name for name in CASES if name != "vit-b16"]
# FlaxViT accepts square patches only.
PAIRS = [
    pytest.param(name, pair, id=f"{name}-{'-'.join(pair)}", marks=pytest.mark.xdist_group(f"references {name}"))
    for name in SMALL
    for pair in combinations(REFERENCES, 2)
    if name != "rectangular-patch" or "flax" not in pair
]


def needs(*references: str) -> None:
    """Skips if one is not installed: transformers 5 has no FlaxViT, and PyTorch is an extra."""
    for reference in references:
        try:
            require(reference)
        except ReferenceUnavailableError as error:
            pytest.skip(str(error))


@cache
def trace(reference: str, name: str, dtype: DTypeLike = np.float64) -> Trace:
    needs(reference)
    case = CASES[name]
    return reference_for(case.config, case.checkpoint().tensors, reference).trace(case.images(), precision_of(dtype))


def apart(found: Trace, truth: Trace) -> list[str]:
    """Returns the sites at which two traces differ, in the order of the forward pass."""
    assert found.keys() == truth.keys()
    return [site for site in truth if not error(found[site], truth[site]).passes_semantic_gate]


@pytest.mark.parametrize(("name", "pair"), PAIRS)
def test_references_agree_at_every_site_in_float64(name: str, pair: tuple[str, str]) -> None:
    one, other = (trace(reference, name) for reference in pair)
    assert {value.dtype for value in (*one.values(), *other.values())} == {np.dtype(np.float64)}
    assert one.keys() == {site.name for site in sites(CASES[name].config, 1)}
    assert apart(one, other) == []


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_in_half_precision_pytorchs_stream_stays_wide(dtype: type) -> None:
    found, shapes = trace("torch", "rectangular", dtype), sites(CASES["rectangular"].config, 1)
    assert {name: value.dtype for name, value in found.items()} == {site.name: site.dtype(dtype) for site in shapes}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["rectangular", "hard-tokens", "one-head"])
def test_pytorch_passes_the_numerical_gate_as_a_candidate_would(name: str, dtype: type) -> None:
    found, other, truth = trace("torch", name, dtype), trace("flax", name, dtype), trace("numpy", name)
    case = CASES[name]
    for site in sites(case.config, len(case.images())):
        own = error(other[site.name], truth[site.name])
        assert error(found[site.name], truth[site.name]).rms <= numerical_gate(own.rms, dtype, own.carriers), site.name


class TorchAsPort(TorchViTReference):
    # Every site that the reference shows.
    claims = None


# Every kind of output once and every precision once, because FlaxViT's backward pass takes seconds to compile.
@pytest.mark.parametrize(
    ("name", "dtype"), [("rectangular", np.float32), ("pooler", ml_dtypes.bfloat16), ("headless", np.float16)]
)
def test_pytorchs_gradients_are_flaxvits(name: str, dtype: type) -> None:
    needs("flax", "torch")
    case, source = CASES[name], CASES[name].checkpoint()
    candidate = TorchAsPort(case.config, source.tensors)
    report = Session(case.config, source, case.images(), candidate, dtype, title="PyTorch").backward()
    assert report.passed, f"{headline(report)}\n\n{table(report)}"


def test_pytorch_has_gradients_of_rectangular_patches() -> None:
    needs("torch")
    case, source = CASES["rectangular-patch"], CASES["rectangular-patch"].checkpoint()
    candidate = OwnCandidate(case.config, source)
    report = Session(case.config, source, case.images(), candidate, reference="torch", title="patches").backward()
    assert report.passed, f"{headline(report)}\n\n{table(report)}"
    assert report.reference == "PyTorch"
    assert all(result.gate > 6 * result.reference_error for result in report.results)
    assert len(report.results) == len(sites(case.config, 1)) + len(list_parameters(case.config)) + 1


@pytest.mark.parametrize("site", [site for site, _ in BLOCK_SITES])
def test_a_reference_seen_in_a_wrong_place_is_refused(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torch")
    shapes = dict(BLOCK_SITES)
    other = next((mate for mate in shapes if shapes[mate] == shapes[site] and mate != site), None)
    for blocks in torch_vit._BLOCKS.values():
        if other:
            wrong = blocks[other]
        else:  # only the probabilities have this shape
            wrong = torch_vit._Seen(blocks[site].module, lambda arguments, returned: returned[1].transpose(2, 3))
        monkeypatch.setitem(blocks, site, wrong)
    case = CASES["rectangular"]
    found = TorchViTReference(case.config, case.checkpoint().tensors).trace(case.images(), FLOAT64)
    assert apart(found, trace("numpy", "rectangular")) == [f"block.{i}.{site}" for i in range(2)]


def test_a_value_that_the_model_does_not_use_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torch")
    for blocks in torch_vit._BLOCKS.values():
        copy = torch_vit._Seen(blocks["attn.query"].module, lambda arguments, returned: returned.clone())
        monkeypatch.setitem(blocks, "attn.query", copy)
    case = CASES["rectangular"]
    differentiate = TorchViTReference(case.config, case.checkpoint().tensors).gradients(case.images(), FLOAT64)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        differentiate(objectives_for((case.batch, case.config.num_labels))[0])


def test_a_softmax_rounded_to_float32_behind_its_dtype_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torch")
    monkeypatch.setattr(torch_vit, "_softmax_in_float64", contextlib.nullcontext)
    case = CASES["rectangular"]
    found = TorchViTReference(case.config, case.checkpoint().tensors).trace(case.images(), FLOAT64)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float64)}
    assert apart(found, trace("numpy", "rectangular"))[0] == "block.0.attn.probs"


@pytest.mark.parametrize("ask", ["trace", "gradients"])
def test_the_torch_reference_refuses_rounded_products(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torch")
    monkeypatch.setattr(torch_vit, "products", lambda: "tensorfloat32")
    case = CASES["rectangular"]
    run = getattr(TorchViTReference(case.config, case.checkpoint().tensors), ask)
    run(case.images(), FLOAT64)
    with pytest.raises(
        InputError, match="unrounded float32 products, but this device rounds to tensorfloat32"
    ) as caught:
        run(case.images(), precision_of(np.float32))
    # It must not be an error that a suite would skip.
    assert not isinstance(caught.value, UnsupportedByReferenceError)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_tensors_that_pytorch_does_not_take_are_named(kind: str) -> None:
    needs("torch")
    case = CASES["rectangular"]
    tensors = dict(case.checkpoint().tensors)
    name = "vit.layernorm.bias"
    if kind == "missing":
        del tensors[name]
    elif kind == "mismatched":
        tensors[name] = tensors[name][1:]
    else:
        name = "vit.layernorm.gain"
        tensors[name] = np.ones(3)
    with pytest.raises(InputError, match=rf"do not fit PyTorch's ViT: {kind} .*{name}"):
        TorchViTReference(case.config, tensors)


def test_a_vit_of_unknown_structure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torch")
    monkeypatch.setattr(torch_vit, "_BLOCKS", {"transformer.blocks": torch_vit._BLOCKS["layers"]})
    case = CASES["rectangular"]
    with pytest.raises(ReferenceUnavailableError, match="has an unknown structure"):
        TorchViTReference(case.config, case.checkpoint().tensors).trace(case.images(), FLOAT64)


@pytest.mark.parametrize("name", ["flax", "torch"])
def test_a_fused_reference_has_the_same_float64_gradients(name: str) -> None:
    """Otherwise the candidate would be allowed the error of a wrong formula."""
    needs(name)
    case = CASES["rectangular"]
    reference = reference_for(case.config, case.checkpoint().tensors, name)
    objective = objectives_for((case.batch, case.config.num_labels))[1]
    own, fused = (
        each.gradients(case.images(), FLOAT64)(objective).named()
        for each in (reference, with_fused_attention(reference))
    )
    probabilities = {site.name for site in sites(case.config, 1) if site.name.endswith(".attn.probs")}
    assert own.keys() - fused.keys() == probabilities
    truths = truths_of({site: value for site, value in own.items() if site not in probabilities})
    errors = errors_of(fused, truths)
    assert errors.keys() == truths.keys()
    assert [site for site, each in errors.items() if not each.passes_semantic_gate] == []
    assert any((fused[site] != own[site]).any() for site in errors)
