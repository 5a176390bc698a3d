"""Do right candidates pass, whatever the configuration, the weights and the images?

To run a thousand of them, and 300 of a candidate in PyTorch:
pytest tests/properties/test_no_false_alarm.py --hypothesis-profile thousand
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.vit_strategies import configs, seeds
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.report import headline, table
from vit_ref.verify.session import Session, prepare_candidate
from vit_ref.weights import checkpoint, writing
from vit_ref.weights.checkpoint import Checkpoint

# These tests compile what users run.
pytestmark = pytest.mark.optimised

PORT = Path(__file__).parents[1] / "candidates" / "worked" / "torch_timm.py"
# Every example compiles four functions of its own, which need not be kept for a thousand examples.
_CHECKED = itertools.count(1)
# In an MLP of one or two units, a whole site may lie in GELU's far tail, where 1 + tanh cancels in float64. No real
# candidate has two tokens of so few channels.
plausible = configs(min_width=5).filter(lambda config: config.intermediate_size >= 7)


@given(config=plausible, batch=st.integers(1, 5), seed=seeds)
def test_a_right_port_passes_both_gates(config: ViTConfig, batch: int, seed: int) -> None:
    if next(_CHECKED) % 50 == 0:
        jax.clear_caches()
    case = Case("random", config, batch=batch, seed=seed)
    _require_passed(config, case.checkpoint(), case)


@pytest.mark.parametrize("bias", [-3.5, -5.0, -9.0])
def test_a_layer_far_in_the_tail_of_gelu_passes_too(bias: float) -> None:
    """Puts all units of a layer far below zero, where values have relative accuracy only."""
    case = CASES["rectangular"]
    source = case.checkpoint()
    layer = "vit.encoder.layer.0.intermediate.dense"
    source.tensors[f"{layer}.weight"] *= np.float32(0.2)
    source.tensors[f"{layer}.bias"][:] = bias
    _require_passed(case.config, source, case)


@st.composite
def of_the_port(draw: st.DrawFn) -> ViTConfig:
    """Limits configurations to those of the candidate in PyTorch and of FlaxViT, whose patches and grid are square.

    There are at least five tokens of eight channels, because right gradients of fewer elements may differ by more than
    any gate.
    """
    side, patch = draw(st.integers(2, 4)), draw(st.sampled_from((2, 3, 5)))
    config = draw(configs(min_width=8).filter(lambda config: config.intermediate_size >= 7))
    fixed = {"hidden_act": "gelu", "qkv_bias": True, "pooler": False, "pooler_output_size": None}
    labels = draw(st.integers(1, 7))
    return dataclasses.replace(config, image_size=side * patch, patch_size=patch, num_labels=labels, **fixed)


@pytest.mark.torch
@settings(max_examples=-(-3 * settings.default.max_examples // 10))
@given(
    config=of_the_port(),
    batch=st.integers(2, 5),
    seed=seeds,
    attention=st.sampled_from(("fused", "candidate")),
    # The distance of queries and keys in the first channel of the first head. All tokens then attend to one, with
    # scores
    # of up to some hundred. Trained checkpoints have such heads, and fused attention rounds most there. Such a head has
    # nearly no gradient, so the model needs other heads beside it.
    sink=st.sampled_from((0, 5, 10)),
    # To compile FlaxViT takes longer than all the rest.
    reference=st.sampled_from(("torch", "torch", "flax")),
)
def test_a_right_port_in_pytorch_passes_forward_and_backward(
    config: ViTConfig, batch: int, seed: int, attention: str, sink: int, reference: str
) -> None:
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    if next(_CHECKED) % 50 == 0:
        jax.clear_caches()
    case = Case("random", config, batch=batch, seed=seed)
    source, images = case.checkpoint(), case.images()
    if config.num_attention_heads > 1:
        for name, tensor in source.tensors.items():
            if name.endswith("query.bias"):
                tensor[0] += np.float32(sink)
            if name.endswith("key.weight"):
                tensor[0] *= np.float32(max(sink / 2, 1))
    with tempfile.TemporaryDirectory() as directory:
        writing.write_directory(directory, source.tensors, source.config or {})
        port = prepare_candidate(f"{PORT}:{attention}", config, checkpoint.read(directory))
        reports = (
            Session(config, source, images, port, reference=reference, title=case.name).forward(),
            Session(config, source, images[:2], port, reference=reference, title=case.name).backward(),
        )
    for report in reports:
        assert report.passed, f"{headline(report)}\n\n{table(report)}"


def _require_passed(config: ViTConfig, source: Checkpoint, case: Case) -> None:
    report = Session(config, source, case.images(), OwnCandidate(config, source), title=case.name).forward()
    assert report.passed, f"{headline(report)}\n\n{table(report)}"
