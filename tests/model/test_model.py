"""Does the model alone do what its configuration says?"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError
from vit_ref.model import vit as vit_module
from vit_ref.model.activations import ACTIVATIONS
from vit_ref.model.config import ACTIVATION_NAMES, ViTConfig
from vit_ref.model.sites import sites
from vit_ref.model.skeleton import list_parameters
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES, Case, synthetic_images
from vit_ref.verify.gates import error
from vit_ref.verify.references.numpy_oracle import ACTIVATIONS as ORACLES_ACTIVATIONS

SMALL = [case for case in CASES.values() if case.name != "vit-b16"]


Filled = Callable[..., VisionTransformer]


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        # torchvision's vit_b_16, vit_b_32, vit_l_16 and vit_h_14; timm's vit_tiny_patch16_224 and vit_small_patch16_224
        ("B/16", 86_567_656),
        ("B/32", 88_224_232),
        ("L/16", 304_326_632),
        ("H/14", 632_045_800),
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
    ],
)
def test_variants_have_the_published_parameter_counts(variant: str, parameters: int) -> None:
    shapes = list_parameters(ViTConfig.variant(variant))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_tap_sees_every_site_in_order_with_the_foretold_shape(case: Case, filled: Filled) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def tap(site: str, value: jax.Array) -> jax.Array:
        seen.append((site, value.shape))
        return value

    # An abstract run has the shapes of a real one, and compiles nothing.
    output = jax.eval_shape(partial(filled(case.config), tap=tap), case.images())
    assert seen == [(site.name, site.shape) for site in sites(case.config, case.batch)]
    if case.config.num_labels or case.config.pooler:
        assert output.shape == seen[-1][1]
    else:
        assert output.shape == (case.batch, case.config.hidden_size)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_plain_and_the_observed_path_agree(case: Case, filled: Filled) -> None:
    vit, pixels = filled(case.config), jnp.asarray(case.images())
    plain = vit(pixels)
    observed = vit(pixels, tap=lambda site, value: value)
    scale = float(jnp.sqrt(jnp.mean(observed**2)))
    # Both sum the same products. Dividing by the sum of exponentials before or after the product costs a few roundings
    # a
    # block. A wrong scale or softmax makes 1e-2 and more.
    np.testing.assert_allclose(plain, observed, rtol=0, atol=16 * 2**-23 * scale)


@pytest.mark.parametrize(
    ("dtype", "rate", "training", "observed", "asked"),
    [
        (jnp.float32, 0.5, False, False, False),
        (jnp.bfloat16, 0.5, False, False, False),
        (jnp.float64, 0.5, False, False, False),
        (jnp.float32, 0.5, False, True, True),
        (jnp.float32, 0.5, True, False, True),
        (jnp.float32, 0.0, True, False, False),
    ],
)
def test_probabilities_are_asked_for_by_a_tap_or_dropout_alone(
    dtype: type, rate: float, training: bool, observed: bool, asked: bool, monkeypatch, filled: Filled
) -> None:
    """Counts calls, because the values are the same either way."""
    attend, calls = vit_module.attend, []
    monkeypatch.setattr(vit_module, "attend", lambda *qkv: (calls.append(qkv), attend(*qkv))[1])
    config = dataclasses.replace(CASES["rectangular"].config, attention_probs_dropout_prob=rate)
    tap = {"tap": lambda site, value: value} if observed else {}
    with precision_of(dtype).active():
        vit = filled(config, dtype=dtype)
        if training:
            vit.train()
        jax.eval_shape(lambda x: vit(x, rngs=nnx.Rngs(dropout=0), **tap), CASES["rectangular"].images())
    assert len(calls) == (0 if asked else config.num_hidden_layers)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_two_paths_agree_in_half_precision_too(dtype: type, filled: Filled) -> None:
    case = CASES["rectangular"]
    with precision_of(dtype).active():
        vit, pixels = filled(case.config, dtype=dtype), jnp.asarray(case.images())
        plain, observed = vit(pixels), vit(pixels, tap=lambda site, value: value)
    off = error(np.asarray(plain), np.asarray(observed, np.float64)).rms
    # On a CPU they are equal to the last bit.
    assert off <= float(jnp.finfo(dtype).eps), f"{off:.1e}"


@pytest.mark.parametrize("spelling", [jnp.float64, "float64", np.dtype("float64")])
def test_float64_takes_no_path_that_rounds_to_float32(spelling: DTypeLike) -> None:
    config = CASES["rectangular"].config
    with precision_of(jnp.float64).active():
        vit = VisionTransformer(config, dtype=spelling, param_dtype=spelling, rngs=nnx.Rngs(0))
        seen: set[np.dtype] = set()
        pixels = jnp.asarray(CASES["rectangular"].images(), jnp.float64)
        plain, tapped = vit(pixels), vit(pixels, tap=lambda site, value: (seen.add(value.dtype), value)[1])
        assert seen == {plain.dtype} == {np.dtype("float64")}
        # A softmax in float32 would make this 1e-8.
        assert error(np.asarray(plain), np.asarray(tapped)).rms < 1e-14


def test_a_tap_can_replace_a_value(filled: Filled) -> None:
    vit, pixels = filled(CASES["rectangular"].config), jnp.asarray(CASES["rectangular"].images())
    stream = jnp.ones((5, 17, 33))
    logits = vit(pixels, tap=lambda site, value: stream if site == "block.1.mlp.residual" else value)
    np.testing.assert_allclose(logits, jnp.broadcast_to(vit.head(vit.norm(stream[:, 0])), (5, 23)), rtol=1e-6)


def test_evaluation_drops_nothing_and_training_does(filled: Filled) -> None:
    config = CASES["rectangular"].config
    assert config.hidden_dropout_prob > 0 and config.attention_probs_dropout_prob > 0
    vit, pixels = filled(config), jnp.asarray(CASES["rectangular"].images())
    without = filled(dataclasses.replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    np.testing.assert_array_equal(vit(pixels), without(pixels))
    vit.train()
    first, second = vit(pixels, rngs=nnx.Rngs(dropout=1)), vit(pixels, rngs=nnx.Rngs(dropout=2))
    assert (first != second).all()
    np.testing.assert_array_equal(first, vit(pixels, rngs=nnx.Rngs(dropout=1)))
    vit.eval()
    np.testing.assert_array_equal(vit(pixels), without(pixels))


def test_attention_dropout_alone_is_live_in_training(filled: Filled) -> None:
    config = dataclasses.replace(CASES["rectangular"].config, hidden_dropout_prob=0.0)
    vit, pixels = filled(config), jnp.asarray(CASES["rectangular"].images())
    evaluated = vit(pixels)
    vit.train()
    assert (vit(pixels, rngs=nnx.Rngs(dropout=1)) != evaluated).all()


def test_layer_norm_survives_a_mean_far_above_the_deviation(filled: Filled) -> None:
    """Normalises large values: E[x^2] - E[x]^2 would lose mean^2 / variance = 1e8 units of rounding, or be negative."""
    vit = filled(ViTConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1, layer_norm_eps=1e-12))
    x = (1e4 + np.random.default_rng(0).normal(size=(1, 3, 64))).astype(np.float32)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    scale, bias = (np.asarray(parameter[...], np.float64) for parameter in (vit.norm.scale, vit.norm.bias))
    truth = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True)) * scale + bias
    # Two passes lose only one unit of rounding of the mean, 1e4 * 2^-24, which is 6e-4 of the unit deviation.
    np.testing.assert_allclose(vit.norm(x), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_stream_and_norms_in_float32(dtype: type, filled: Filled) -> None:
    seen: dict[str, jnp.dtype] = {}

    def tap(site: str, value: jax.Array) -> jax.Array:
        seen[site] = value.dtype
        return value

    with precision_of(dtype).active():
        vit = filled(CASES["rectangular"].config, dtype=dtype)
        jax.eval_shape(partial(vit, tap=tap), CASES["rectangular"].images())
    wide = {site for site, found in seen.items() if found == jnp.float32}
    assert wide == {site for site in seen if site == "embeddings" or "norm" in site or "residual" in site}
    assert {found for site, found in seen.items() if site not in wide} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_the_softmax_once(dtype: type, filled: Filled) -> None:
    """Starts from the same queries and keys. Parity cannot test this, as FlaxViT's softmax is in half precision."""
    trace: dict[str, jax.Array] = {}
    case = CASES["rectangular"]
    with precision_of(dtype).active():
        filled(case.config, dtype=dtype)(jnp.asarray(case.images()), tap=trace.setdefault)
    for i in range(case.config.num_hidden_layers):
        query, key = (np.asarray(trace[f"block.{i}.attn.{role}"], np.float64) for role in ("query", "key"))
        scores = np.exp(np.einsum("bqhk,bmhk->bhqm", query, key) / np.sqrt(case.config.head_dim))
        expected = scores / scores.sum(-1, keepdims=True)
        site = f"block.{i}.attn.probs"
        # Half a unit of rounding. With rounded scores the error is more than twice that.
        off = np.abs(np.asarray(trace[site], np.float64) - expected) / (expected + float(jnp.finfo(dtype).tiny))
        assert off.max() <= 0.51 * float(jnp.finfo(dtype).eps), f"{site} is off by {off.max():.1e}"


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_every_activation_is_the_oracles(name: str) -> None:
    with precision_of(np.float64).active():
        x = jnp.linspace(-6, 6, 97)
        found = ACTIVATIONS[name](x)
    # A few roundings of values up to six. The two forms of GELU differ by 5e-4, and quick_gelu from either by 2e-2.
    np.testing.assert_allclose(found, ORACLES_ACTIVATIONS[name](np.asarray(x)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gelu_in_half_precision_is_rounded_once(dtype: type) -> None:
    x = jnp.linspace(-6, 6, 1001, dtype=dtype)
    truth = ORACLES_ACTIVATIONS["gelu"](np.asarray(x, np.float64))
    off = np.abs(np.asarray(ACTIVATIONS["gelu"](x), np.float64) - truth)
    # Half a unit of the result and, for small results, one unit of float32 at x, which is left of the sum of one and
    # erf. With a rounding at each step the error would be several times that.
    assert (off <= 0.51 * float(jnp.finfo(dtype).eps) * np.abs(truth) + 2.0**-23 * np.abs(x)).all()


@pytest.mark.parametrize("name", sorted(set(ACTIVATION_NAMES) - {"relu", "tanh"}))
def test_an_activation_keeps_its_argument_alone_for_the_way_back(name: str) -> None:
    """Leaves out relu and tanh, which need only their result, and the next layer keeps that."""
    x = jnp.linspace(-6, 6, 97)
    (kept,) = jax.tree.leaves(jax.vjp(ACTIVATIONS[name], x)[1])
    np.testing.assert_array_equal(kept, x)


def test_a_model_starts_in_evaluation() -> None:
    """Traces each part without `rngs`, which active dropout needs."""
    pixels = CASES["rectangular"].images()

    def output(training: bool, pixels: jax.Array) -> jax.Array:
        vit = VisionTransformer(CASES["rectangular"].config, rngs=nnx.Rngs(0))
        if training:
            vit.train()
        return vit(pixels)

    assert jax.eval_shape(partial(output, False), pixels).shape == (5, 23)
    with pytest.raises(ValueError, match="no `rngs` argument was provided"):
        jax.eval_shape(partial(output, True), pixels)


def test_initialisation_has_the_deviation_and_is_reproducible() -> None:
    config = ViTConfig.variant("Ti/16", num_hidden_layers=1, initializer_range=0.05)
    vit, again = (VisionTransformer(config, rngs=nnx.Rngs(7)) for _ in range(2))
    other = VisionTransformer(config, rngs=nnx.Rngs(8))
    for drawn in (vit.patch.kernel, vit.position_embeddings, vit.blocks[0].attn.out.kernel, vit.head.kernel):
        # At least 37,000 draws: the sample's deviation is within 3 % except once in 10^15.
        assert abs(float(jnp.std(drawn[...])) / 0.05 - 1) < 0.03
    np.testing.assert_array_equal(vit.head.kernel[...], again.head.kernel[...])
    assert (vit.head.kernel[...] != other.head.kernel[...]).mean() > 0.99


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 2, 10, 40),
            "pixels have 40 channels: give 2, as the model takes; they look channels-first: transpose them to NHWC",
        ),
        ((2, 10, 40, 3), "pixels have 3 channels: give 2, as the model takes"),
        ((2, 1, 40, 3), "pixels have 3 channels: give 2, as the model takes"),
        ((2, 10, 40, 1), "pixels have 1 channels: give 2, as the model takes"),
        ((2, 12, 40, 2), "images have [12, 40] pixels, not a multiple of the patch [5, 5]: resize them"),
        ((2, 10, 42, 2), "images have [10, 42] pixels, not a multiple of the patch [5, 5]: resize them"),
        ((2, 0, 40, 2), "images have [0, 40] pixels, not a multiple of the patch [5, 5]: resize them"),
        ((2, 10, 0, 2), "images have [10, 0] pixels, not a multiple of the patch [5, 5]: resize them"),
        *(
            (
                (2, *size, 2),
                f"images have {size} pixels, and the model takes [10, 40]: resize them, or pass"
                " interpolate_pos_encoding=True",
            )
            for size in ([40, 10], [5, 40], [10, 35], [10, 45])
        ),
        *(
            (shape, f"pixels have shape {shape}: give a batch of images (B, height, width, channels)")
            for shape in ((10, 40, 2), (1, 2, 10, 40, 2))
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    # The check needs no values: a model without arrays passes it.
    vit = nnx.eval_shape(lambda: VisionTransformer(CASES["rectangular"].config, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError) as caught:
        vit(np.ones(shape, np.float32))
    assert str(caught.value) == message


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(filled: Filled) -> None:
    with pytest.raises(ValueError, match=r"images have \[12, 40\] pixels, not a multiple of the patch \[5, 5\]"):
        filled(CASES["rectangular"].config)(jnp.ones((2, 12, 40, 2)), interpolate_pos_encoding=True)


def test_synthetic_images_differ_in_every_way_that_hides_bugs() -> None:
    images = synthetic_images(CASES["rectangular"].config, batch=3)
    assert images.std(axis=(1, 2)).min() > 0.1
    assert np.abs(np.corrcoef(images.reshape(3, -1)) - np.eye(3)).max() < 0.9
    assert np.abs(np.corrcoef(images.transpose(3, 0, 1, 2).reshape(2, -1)) - np.eye(2)).max() < 0.9
    assert np.abs(images - images[:, ::-1]).max() > 0.1 and np.abs(images - images[:, :, ::-1]).max() > 0.1


def test_importing_the_package_stays_light() -> None:
    heavy = "{'transformers', 'torch', 'PIL', 'matplotlib', 'grain', 'pytest', 'scipy.stats'}"
    code = f"import sys, vit_ref; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
