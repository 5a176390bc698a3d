"""The worked candidates: a right one passes in any style, and the typical bug of its style is found at its site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import vit_ref
from vit_ref.errors import InputError
from vit_ref.verify.candidates.loading import find
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.behaviour import require_repeatable
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.results import CandidateReport
from vit_ref.verify.session import check_port, prepare_candidate
from vit_ref.weights import checkpoint
from vit_ref.weights.pretrained import read_configuration

ONLY_TORCH = pytest.mark.torch


def status_of(report: CandidateReport, prefix: str) -> dict[str, str]:
    return {check.site: check.status for check in report.checks if check.name.startswith(prefix)}


def kinds(sites: tuple[str, ...]) -> set[str]:
    """Returns the part of each site's name after the block, such as "attn.probs"."""
    return {".".join(site.split(".")[2:]) or site for site in sites}


@pytest.mark.parametrize(
    ("file", "case", "unseen"),
    [
        ("nnx_tutorial.py", "one-block", {"attn.probs"}),
        ("linen_big_vision.py", "one-block", {"attn.probs"}),
        (
            "equinox_vmapped.py",
            "one-block",
            {"attn.query", "attn.key", "attn.value", "attn.probs", "attn.context"},
        ),
        ("jax_scanned.py", "rectangular", {"attn.out", "norm2", "mlp.fc1", "mlp.out"}),
        pytest.param("torch_timm.py", "rectangular", set(), marks=ONLY_TORCH),
    ],
)
def test_a_right_candidate_passes_at_every_site_it_shows(
    file: str, case: str, unseen: set[str], locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    report = check_port(locate(file), saved(case))
    assert [check for check in report.checks if check.status == "failed"] == []
    assert report.passed
    assert kinds(report.forward.unmapped) == unseen
    # Every parameter's gradient was compared, and the pixels'.
    assert report.backward is not None
    assert [name for name in report.backward.unmapped if name.startswith("blocks.") or name == "pixels"] == []
    assert {"cls_token", "patch.kernel", "blocks.0.attn.key.kernel", "blocks.0.mlp.fc2.bias", "head.bias"} <= set(
        status_of(report, "backward/")
    )


@pytest.mark.parametrize(
    ("spec", "case", "site", "cause"),
    [
        ("nnx_tutorial.py:wrong", "rectangular", "block.0.norm1", "LayerNorm epsilon 1e-06"),
        ("nnx_tutorial.py:wrong_gelu", "rectangular", "block.0.mlp.hidden", "tanh GELU"),
        ("linen_big_vision.py:wrong", "rectangular", "block.0.attn.out", "heads merged in the wrong order"),
        ("linen_big_vision.py:wrong_epsilon", "rectangular", "block.0.norm1", "LayerNorm epsilon 1e-06"),
        ("equinox_vmapped.py:wrong", "rectangular", "embeddings", "cls token without its position"),
        ("equinox_vmapped.py:wrong_epsilon", "rectangular", "block.0.norm1", "LayerNorm epsilon 1e-05"),
        ("jax_scanned.py:wrong", "deep", "block.2.norm1", "parameters of block.10.norm1"),
        pytest.param(
            "torch_timm.py:wrong",
            "rectangular",
            "block.0.attn.query",
            "fused query, key and value split in the wrong order",
            marks=ONLY_TORCH,
        ),
    ],
)
def test_the_typical_bug_of_each_style_is_found_and_named(
    spec: str, case: str, site: str, cause: str, locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    report = check_port(locate(spec), saved(case), backward=False)
    assert not report.passed
    assert report.forward.semantic_failures[0].site == site
    assert [found.label for found in report.forward.causes] == [cause]
    # Although its formulas are wrong, it repeats its values.
    assert set(status_of(report, "behaviour/").values()) == {"passed"}


@ONLY_TORCH
def test_active_dropout_is_reported_before_anything_else(
    locate: Callable[[str], str], saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vit_ref.verify.session.Session.forward")
    for ask in (check_port, vit_ref.propose):
        with pytest.raises(
            InputError,
            match=r"^torch_timm-wrong_mode: two runs on the same inputs differ: is dropout live\? load it in",
        ):
            ask(locate("torch_timm.py:wrong_mode"), saved("rectangular"))


class Module(nnx.Module):
    """A linen module, bridged, as a submodule of an nnx module."""

    def __init__(self, inner: nnx.bridge.ToNNX):
        self.inner = inner

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.inner(images)


def bridged(path: Path, linen_port: vit_ref.Candidate) -> nnx.Module:
    module, variables = linen_port.load(path)
    inner = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(inner, CASES["rectangular"].images())

    def filled(model: Any, tree: dict[str, Any]) -> Any:
        return {
            name: filled(model[name], value) if isinstance(value, dict) else model[name].replace(jnp.asarray(value))
            for name, value in tree.items()
        }

    own = {name: getattr(inner, name) for name in variables["params"]}
    for name, value in filled(own, variables["params"]).items():
        setattr(inner, name, value)
    return Module(inner)


def around_its_blocks(transformation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a loader of the tutorial's candidate, with live random streams.

    Its block's `__call__` runs under a transformation of nnx.
    """

    def load(path: Path, tutorial: vit_ref.Candidate) -> nnx.Module:
        model: Any = tutorial.load(path)
        for block in model.encoder.layers:
            kind = type(block)
            block.__class__ = type(kind.__name__, (kind,), {"__call__": transformation(kind.__call__)})
            block.mlp.layers[2] = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
        return model

    return load


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("nnx_tutorial.py", around_its_blocks(nnx.remat)),
        ("nnx_tutorial.py", around_its_blocks(nnx.jit)),
        ("linen_big_vision.py", bridged),
    ],
    ids=["remat", "jit", "ToNNX"],
)
def test_state_under_an_nnx_transformation_is_allowed(
    file: str, load: Callable[..., Any], locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    worked = find(locate(file))
    candidate = vit_ref.Candidate(load=partial(load, **{"linen_port" if load is bridged else "tutorial": worked}))
    source = checkpoint.read(saved("rectangular"))
    config, pixels = read_configuration(source), CASES["rectangular"].images()
    made = prepare_candidate(candidate, config, source)
    require_repeatable(made, pixels[:1])
    right = NumpyOracle(config, source.tensors).trace(pixels)["logits"]
    assert error(made.outputs([pixels], FLOAT64)[0], right).rms < SEMANTIC_RMS


def test_parameters_in_boxes_have_the_names_of_those_without(
    locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    worked = find(locate("linen_big_vision.py"))

    def load(path: Path) -> Any:
        module, variables = worked.load(path)
        boxed = jax.tree.map(lambda x: linen.Partitioned(jnp.asarray(x), (None,) * x.ndim), variables["params"])
        return module, {"params": boxed}

    source = checkpoint.read(saved("rectangular"))
    made = [
        prepare_candidate(each, read_configuration(source), source)
        for each in (dataclasses.replace(worked, load=load), worked)
    ]
    boxed, plain = (each.by_path(each.ready(np.float32)[0]) for each in made)
    assert boxed.keys() == plain.keys() and len(boxed) == 40
    (found,) = made[0].outputs([CASES["rectangular"].images()], FLOAT64)
    (expected,) = made[1].outputs([CASES["rectangular"].images()], FLOAT64)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.optimised
def test_the_corrected_tutorial_passes_on_given_checkpoints(
    locate: Callable[[str], str], pytestconfig: pytest.Config
) -> None:
    paths, images = pytestconfig.getoption("checkpoint", None), pytestconfig.getoption("images", None)
    if not paths:
        pytest.skip("needs real weights: --checkpoint DIR_OR_HUB_ID")
    for path in paths:
        config = read_configuration(checkpoint.read(path))
        if (config.hidden_act, config.layer_norm_eps, config.num_labels > 0) != ("gelu", 1e-6, True):
            pytest.skip(f"{path}: the tutorial's epsilon is 1e-6, its activation GELU, and it has a head")
        wrong = check_port(locate("nnx_tutorial.py:wrong"), path, images=images, backward=False)
        assert not wrong.passed
        assert wrong.forward.semantic_failures[0].site == "block.0.mlp.hidden"
        assert [cause.label for cause in wrong.forward.causes] == ["tanh GELU"]
        # Backward it is judged on one block, above: the way back through twelve takes a minute to compile.
        right = check_port(locate("nnx_tutorial.py"), path, images=images, backward=False)
        assert [check for check in right.checks if check.status == "failed"] == []
        assert right.passed
