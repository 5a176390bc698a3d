"""Do the maps show the attention of the model?"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError
from vit_ref.finetune.attention import compute_attention_maps
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.trace import Trace
from vit_ref.weights.pretrained import get_parameters


def rolled_out(trace: Trace, depth: int) -> np.ndarray:
    """Computes equation 1 of Abnar & Zuidema (2020) with whole matrices: (B, 1, patches)."""
    product = 1
    for i in range(depth):
        mean = trace[f"block.{i}.attn.probs"].mean(axis=1)
        mixed = mean + np.eye(mean.shape[-1])
        product = mixed / mixed.sum(-1, keepdims=True) @ (product if i else np.eye(mean.shape[-1]))
    return product[:, None, 0, 1:]


@pytest.mark.parametrize("name", ["headless", "rectangular-patch"])
def test_maps_are_what_the_trace_has(
    name: str, filled: Callable[..., VisionTransformer], traced: Callable[..., Trace]
) -> None:
    case = CASES[name]
    config, pixels = case.config, case.images()
    with precision_of(np.float64).active():
        model = filled(config, dtype=np.float64)
        last = compute_attention_maps(model, pixels.astype(np.float64))
        rollout = compute_attention_maps(model, pixels.astype(np.float64), "rollout")
    trace, depth = traced(config, get_parameters(model), pixels), config.num_hidden_layers
    expected = trace[f"block.{depth - 1}.attn.probs"][:, :, 0, 1:]
    for found, truth in ((last, expected), (rollout, rolled_out(trace, depth))):
        assert found.dtype == np.float32
        assert found.shape == (case.batch, truth.shape[1], *config.grid())
        # One rounding to float32 of a value in float64.
        np.testing.assert_allclose(found.reshape(truth.shape), truth, rtol=1.01 * 2**-24)
    assert np.ptp(last, axis=(2, 3)).min() > 1e-3 and np.ptp(rollout, axis=(2, 3)).min() > 1e-3


def test_attention_maps_are_of_evaluation_mode_and_keep_the_mode(
    filled: Callable[..., VisionTransformer],
) -> None:
    model, pixels = filled(CASES["rectangular"].config), CASES["rectangular"].images()
    expected = compute_attention_maps(model, pixels)
    model.train()
    assert (compute_attention_maps(model, pixels) == expected).all()
    assert not model.blocks[0].attn.dropout.deterministic


def test_maps_are_float32_under_bfloat16(filled: Callable[..., VisionTransformer]) -> None:
    case = CASES["rectangular"]
    with precision_of(jnp.bfloat16).active():
        found = compute_attention_maps(filled(case.config, dtype=jnp.bfloat16), case.images(), "rollout")
    assert found.dtype == np.float32
    # In bfloat16, multiplying the row through the blocks would keep only these 8 bits.
    assert (found != found.astype(jnp.bfloat16).astype(np.float32)).any()


def test_images_of_another_size_are_refused(filled: Callable[..., VisionTransformer]) -> None:
    with pytest.raises(InputError, match=r"images have \[5, 5\] pixels, and the model takes \[10, 40\]"):
        compute_attention_maps(filled(CASES["rectangular"].config), np.zeros((1, 5, 5, 2), np.float32))
