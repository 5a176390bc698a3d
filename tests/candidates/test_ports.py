"""The worked candidates: a right port passes whatever its style, and its style's typical bug is found where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vit_ref import checkpoint
from vit_ref.pretrained import configuration
from vit_ref.verify.check import check_port
from vit_ref.verify.port_report import PortReport

pytestmark = pytest.mark.candidates

ONLY_TORCH = pytest.mark.torch


def status_of(report: PortReport, prefix: str) -> dict[str, str]:
    return {check.site: check.status for check in report.checks if check.name.startswith(prefix)}


def kinds(sites: tuple[str, ...]) -> set[str]:
    """Of "block.3.attn.probs" what comes after the block."""
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
def test_a_right_port_passes_wherever_it_can_be_seen(
    file: str, case: str, unseen: set[str], port: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    report = check_port(port(file), saved(case))
    assert [check for check in report.checks if check.status == "failed"] == []
    assert report.passed
    assert kinds(report.forward.unmapped) == unseen
    # Every parameter's gradient was judged, and the pixels'.
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
def test_the_bug_of_its_style_is_found_where_it_is_and_named(
    spec: str, case: str, site: str, cause: str, port: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    report = check_port(port(spec), saved(case), backward=False)
    assert not report.passed
    assert report.forward.semantic_failures[0].site == site
    assert [found.label for found in report.forward.causes] == [cause]
    # Whatever is wrong with its formulas, it computes the same each time.
    assert set(status_of(report, "behaviour/").values()) == {"passed"}


@ONLY_TORCH
def test_live_dropout_is_seen_where_it_drops_and_said(port: Callable[[str], str], saved: Callable[[str], Path]) -> None:
    report = check_port(port("torch_timm.py:wrong_mode"), saved("rectangular"), backward=False)
    assert report.forward.semantic_failures[0].site == "embeddings"
    assert status_of(report, "behaviour/") == {"repeat": "failed", "batch": "failed", "inputs": "passed"}
    assert "is dropout live?" in next(check.reason for check in report.checks if check.site == "repeat")


@pytest.mark.optimised
def test_the_tutorials_port_is_right_on_the_given_checkpoints_once_it_is_corrected(
    port: Callable[[str], str], pytestconfig: pytest.Config
) -> None:
    paths, images = pytestconfig.getoption("checkpoint", None), pytestconfig.getoption("images", None)
    if not paths:
        pytest.skip("needs real weights: --checkpoint DIR_OR_HUB_ID")
    for path in paths:
        config = configuration(checkpoint.read(path))
        if (config.hidden_act, config.layer_norm_eps, config.num_labels > 0) != ("gelu", 1e-6, True):
            pytest.skip(f"{path}: the tutorial's epsilon is 1e-6, its activation GELU, and it has a head")
        wrong = check_port(port("nnx_tutorial.py:wrong"), path, images=images, backward=False)
        assert not wrong.passed
        assert wrong.forward.semantic_failures[0].site == "block.0.mlp.hidden"
        assert [cause.label for cause in wrong.forward.causes] == ["tanh GELU"]
        right = check_port(port("nnx_tutorial.py"), path, images=images)
        assert [check for check in right.checks if check.status == "failed"] == []
        assert right.passed and right.backward is not None
