"""Are position embeddings resized as the PyTorch reference resizes them?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.helpers.precisions import precision_of
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.model.vit import VisionTransformer, resize_positions
from vit_ref.verify.cases import CASES
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.weights import layouts, mapping
from vit_ref.weights.pretrained import build, get_parameters

# A 3 x 4 grid, and the result of torch 2.13.0 in float64:
# torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False)
GRID = np.array([((7 * k * k + 3 * k) % 11 - 5) / 4 for k in range(12)]).reshape(3, 4)
BY_TORCH = {
    (5, 3): [-0.884696759259259, 0.2661874999999999, 0.11209490740740637, -0.8204166666666669, 0.20875000000000044,
             -0.2737685185185183, -0.5130208333333331, -0.0078125, -0.8075810185185182, 0.36015624999999885,
             -0.5660937499999994, -1.0402997685185174, 1.0069814814814813, -0.9753750000000003, -1.1161481481481477],
    (2, 7): [-1.3421661110035525, -0.35568272893699887, 0.8371634525043277, 0.216583251953125, -0.733550669500501,
             -0.351460626452032, 0.04253767808741796, 1.0804473610035525, 0.12657463585322545, -1.0743879757539174,
             -0.69940185546875, -0.10981149923697141, -0.7828125355890119, -1.350861040565781],
    (1, 1): [-0.0078125],
}  # fmt: skip


@pytest.mark.parametrize("target", BY_TORCH)
def test_resized_positions_are_pytorchs(target: tuple[int, int]) -> None:
    with jax.enable_x64(True):
        cls = jnp.full((1, 1, 2), 7.0)
        # Two features, the second twice the first, show that features are not mixed.
        patches = jnp.asarray(GRID).reshape(1, 12, 1) * jnp.asarray([[[1.0, 2.0]]])
        resized = resize_positions(jnp.concatenate([cls, patches], axis=1), (3, 4), target)
    expected = np.array(BY_TORCH[target])[:, None] * [1.0, 2.0]
    np.testing.assert_array_equal(resized[0, 0], [7.0, 7.0])
    # Sixteen products of values around 1, in float64. A kernel with a = -0.5, antialiasing or aligned corners make
    # 1e-2.
    np.testing.assert_allclose(resized[0, 1:], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("target", BY_TORCH)
def test_a_model_at_another_size_adds_resized_positions(target: tuple[int, int]) -> None:
    config = ViTConfig(
        hidden_size=2,
        num_attention_heads=1,
        num_hidden_layers=1,
        intermediate_size=1,
        image_size=GRID.shape,
        patch_size=1,
        num_channels=1,
        num_labels=1,
    )
    parameters = {path: np.ones(shape) for path, shape in list_parameters(config).items()}
    parameters["position_embeddings"] = (np.append(7.0, GRID)[:, None] * [1.0, 2.0])[None]
    trace: dict[str, jax.Array] = {}
    with precision_of(np.float64).active():
        vit = build(config, parameters, dtype=jnp.float64)
        vit(jnp.ones((1, *target, 1)), tap=trace.setdefault, interpolate_pos_encoding=True)
    added = np.asarray(trace["embeddings"][0, 1:] - trace["patches"][0])
    # Sixteen products, and one sum.
    np.testing.assert_allclose(added, np.array(BY_TORCH[target])[:, None] * [1.0, 2.0], rtol=0, atol=1e-14)


def test_positions_at_the_native_size_are_untouched() -> None:
    positions = jnp.arange(26.0).reshape(1, 13, 2)
    # Equal grids that are two objects, which two literals would not be.
    native, target = (tuple(size) for size in ([3, 4], [3, 4]))
    assert resize_positions(positions, native, target) is positions


@pytest.mark.parametrize("target", BY_TORCH)
def test_the_gradient_of_a_resize_is_its_transpose(target: tuple[int, int]) -> None:
    """Compares with the transpose, because resizing is linear."""
    rng = np.random.default_rng(0)
    with precision_of(np.float64).active():
        positions, moved = (jnp.asarray(rng.normal(size=(1, 13, 2))) for _ in range(2))
        resized, pull = jax.vjp(lambda positions: resize_positions(positions, (3, 4), target), positions)
        cotangent = jnp.asarray(rng.normal(size=resized.shape))
        forward = float(jnp.vdot(cotangent, resize_positions(moved, (3, 4), target)))
        backward = float(jnp.vdot(pull(cotangent)[0], moved))
    # Two sums of up to 32 products of values around one.
    assert abs(forward - backward) <= 64 * np.finfo(np.float64).eps
    assert abs(forward) > 0.1


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_positions_are_resized_in_the_dtype_of_the_computation(stored: type) -> None:
    """Stores positions in bfloat16. Resized in bfloat16 they would be off by 1e-3."""
    case = replace(CASES["rectangular"], stored=stored)
    parameters = mapping.port(case.checkpoint().tensors, case.config, layouts.HF)
    pixels, embeddings = np.ones((1, 15, 30, 2)), {}

    def tap(site: str, value: jax.Array) -> jax.Array:
        embeddings[site] = value
        return value

    with precision_of(np.float64).active():
        vit = build(case.config, parameters, dtype=jnp.float64)
        vit(jnp.asarray(pixels), tap=tap, interpolate_pos_encoding=True)
        exact = jnp.asarray(parameters["position_embeddings"].astype(np.float64))
        expected = resize_positions(exact, (2, 8), (3, 6))[:, 1:] + embeddings["patches"]
        assert error(np.asarray(embeddings["embeddings"][:, 1:]), np.asarray(expected)).rms <= SEMANTIC_RMS


@pytest.mark.torch
@pytest.mark.parametrize("size", [(602, 546), (546, 602), (224, 238), (112, 98)])
def test_a_square_checkpoint_at_another_size_equals_pytorch(
    size: tuple[int, int], filled: Callable[..., VisionTransformer]
) -> None:
    """Runs `ViTForImageClassification(..., interpolate_pos_encoding=True)` in float64, from pixels to logits."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    from transformers import ViTConfig as HFConfig
    from transformers import ViTForImageClassification

    config = replace(CASES["rectangular"].config, num_hidden_layers=1, image_size=224, patch_size=14, num_channels=3)
    pixels = np.random.default_rng(0).normal(size=(1, *size, 3))
    with precision_of(jnp.float64).active():
        vit = filled(config, dtype=jnp.float64)
        ours = jax.jit(partial(vit, interpolate_pos_encoding=True))(pixels)
    theirs = ViTForImageClassification(HFConfig(**config.hf_numerics())).double().eval()
    tensors = mapping.export(get_parameters(vit), config, layouts.HF)
    theirs.load_state_dict({name: torch.tensor(tensor).double() for name, tensor in tensors.items()}, strict=True)
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True).logits.numpy()
    # PyTorch's reference rounds its softmax to float32 even in float64, so the semantic gate's 1e-12 is too strict.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.sqrt(np.mean(expected**2)))
