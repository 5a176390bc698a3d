"""Does transformers load what this package saves, with no key missing or left over, and compute the same?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import vit_ref
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES
from vit_ref.verify.references.flax_vit import FlaxViTReference, require_flaxvit
from vit_ref.weights import layouts, mapping


@pytest.mark.parametrize("name", ["deep", "hard-tokens", "pooler"])
def test_flaxvit_loads_what_is_saved(
    name: str,
    tmp_path: Path,
    filled: Callable[..., VisionTransformer],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_flaxvit()
    import transformers

    config = CASES[name].config
    if config.image_hw[0] != config.image_hw[1]:
        config = vit_ref.ViTConfig(**{**config.__dict__, "image_size": 20})
    model = filled(config)
    vit_ref.save_pretrained(model, tmp_path)
    kind = transformers.FlaxViTForImageClassification if config.num_labels else transformers.FlaxViTModel
    # transformers reports missing and left-over keys only in its log.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.logging.set_verbosity_warning()
    with caplog.at_level(logging.WARNING), caplog.filtering(lambda record: "deprecated" not in record.getMessage()):
        theirs = kind.from_pretrained(tmp_path)
    assert not [record.getMessage() for record in caplog.records if "Some weights" in record.getMessage()]
    pixels = CASES[name].images() if config is CASES[name].config else np.ones((2, 20, 20, config.num_channels), "f4")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        output = theirs(pixel_values=pixels.transpose(0, 3, 1, 2))
    expected = output.logits if config.num_labels else output.pooler_output
    # Two float32 implementations: a few dozen units of rounding after thirteen blocks. A misplaced tensor makes O(1).
    np.testing.assert_allclose(model(jnp.asarray(pixels)), expected, rtol=0, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["deep", "rectangular", "rectangular-patch", "no-qkv-bias", "pooler"])
def test_pytorch_loads_what_is_saved(name: str, tmp_path: Path, filled: Callable[..., VisionTransformer]) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
    import transformers

    config = CASES[name].config
    model = filled(config)
    vit_ref.save_pretrained(model, tmp_path)
    kind = transformers.ViTForImageClassification if config.num_labels else transformers.ViTModel
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    pixels = CASES[name].images()
    with torch.no_grad():
        output = theirs.eval()(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    expected = (output.logits if config.num_labels else output.pooler_output).numpy()
    np.testing.assert_allclose(model(jnp.asarray(pixels)), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["rectangular", "pooler", "no-qkv-bias"])
def test_the_flax_layout_is_flaxvits_own_tree(name: str) -> None:
    """Compares with transformers' converter from PyTorch tensors, with every parameter drawn at random."""
    config, tensors = CASES[name].config, CASES[name].checkpoint().tensors
    theirs = flatten_dict(FlaxViTReference(config, tensors).params, sep="/")
    found = mapping.export(mapping.port(tensors, config, layouts.HF), config, layouts.FLAX)
    assert found.keys() == theirs.keys()
    for path, tensor in theirs.items():
        np.testing.assert_array_equal(found[path], tensor, err_msg=path)


def test_transformers_reads_what_was_saved_last(tmp_path: Path, filled: Callable[..., VisionTransformer]) -> None:
    """Saves beside weights of another format, which were in the directory before."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = CASES["deep"].config
    FlaxViTForImageClassification(ViTConfig(**config.hf_numerics())).save_pretrained(tmp_path)
    assert (tmp_path / "flax_model.msgpack").exists()
    vit_ref.save_pretrained(filled(config), tmp_path)
    theirs = FlaxViTForImageClassification.from_pretrained(tmp_path).params["classifier"]["bias"]
    np.testing.assert_array_equal(theirs, filled(config).head.bias[...])
