"""Embedded cases: configurations, weights and images in which bugs cannot hide.

No parameter keeps its initial value. Dimensions differ and are mostly prime, and heads differ from head_dim. Images are
rectangular, and batches hold several. Dropout rates are above zero, though nothing may be dropped in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.weights import layouts
from vit_ref.weights.checkpoint import WEIGHTS, Checkpoint
from vit_ref.weights.writing import write_directory

_TINY = ViTConfig(
    hidden_size=33,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=47,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.2,
    image_size=(10, 40),
    patch_size=5,
    num_channels=2,
    num_labels=23,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One embedded case.

    Attributes:
      name: the case's name in test ids.
      config: the configuration.
      batch: number of images in a batch.
      seed: seed of the weights and images.
      hard_tokens: whether tokens have variances from 1e-8 to 1 and means of up to 10 standard deviations.
      stored: dtype of the checkpoint's tensors.
    """

    name: str
    config: ViTConfig
    batch: int = 5
    seed: int = 0
    hard_tokens: bool = False
    stored: DTypeLike = np.float32

    def checkpoint(self) -> Checkpoint:
        """Returns random weights under Hugging Face's names, as a file would hold them."""
        rng = np.random.default_rng(self.seed)
        rules = layouts.HF.bind(self.config, prefixed=bool(self.config.num_labels))
        shapes = list_parameters(self.config)
        tensors = {}
        for rule in rules:
            value = _parameter(rng, rule.destination, shapes[rule.destination])
            if self.hard_tokens:
                value = _harden(rule.destination, value)
            if self.stored == np.float64:
                # Without this factor float32 would hold the values exactly, and a loader that rounds to float32 would
                # pass.
                value = value * np.float64(1 + 2**-30)
            tensors[rule.source] = np.ascontiguousarray(rule.transform.to_source(value, self.config)).astype(
                self.stored
            )
        return Checkpoint(Path(self.name), tensors, self.config.to_hf())

    def write(self, directory: Path) -> Checkpoint:
        """Writes the checkpoint to a new directory, from which a candidate can load it.

        Args:
          directory: the directory to make.

        Returns:
          The checkpoint, with that directory as its path.
        """
        source = self.checkpoint()
        write_directory(directory, source.tensors, source.config or {})
        return dataclasses.replace(source, path=directory, files=(directory / WEIGHTS,))

    def images(self) -> NDArray:
        """Returns structured images (batch, height, width, C), float32."""
        return synthetic_images(self.config, self.batch, self.seed)


def _parameter(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> NDArray:
    draw = rng.standard_normal(shape, dtype=np.float32)
    if path.endswith("kernel"):
        # Variance stays about one through the layer. Queries and keys are larger, so that attention is far from
        # uniform.
        gain = 1.5 if ".query." in path or ".key." in path else 1.0
        return draw * np.float32(gain / np.sqrt(np.prod(shape[:-1])))
    if path.endswith("scale"):
        return 1 + draw / 2
    return draw / 2


def _harden(path: str, value: NDArray) -> NDArray:
    """Makes the terms of each token tiny, and gives each position its own deviation and mean."""
    if path == "position_embeddings":
        tokens = value.shape[1]
        deviation = np.logspace(-4, 0, tokens, dtype=np.float32)
        # A mean of ten deviations makes FlaxViT's fast form of the variance err visibly in float32. In float64 its
        # gradients still pass the semantic gate, which they would hardly do with thirty.
        mean = np.where(np.arange(tokens) % 3 == 0, 10 * deviation, 0).astype(np.float32)
        return value * 2 * deviation[:, None] + mean[:, None]
    return value * np.float32(1e-4) if path in ("cls_token", "patch.kernel", "patch.bias") else value


def synthetic_images(config: ViTConfig, batch: int, seed: int = 0) -> NDArray:
    """Returns images with structure at every scale, no two alike: gratings, a ramp and grain.

    Axes and channels differ from each other.

    Args:
      config: the model's configuration.
      batch: the number of images.
      seed: the seed.

    Returns:
      (batch, height, width, C), float32, about zero mean and unit variance.
    """
    rng = np.random.default_rng(seed + 1)
    height, width = config.image_hw
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    shape = (batch, 1, 1, config.num_channels)
    images = np.zeros((batch, height, width, config.num_channels))
    for octave in range(1, 5):
        fy, fx = rng.uniform(0.3, 1.7, (2, *shape)) * 2**octave
        phase, amplitude = rng.uniform(0, 2 * np.pi, shape), rng.normal(size=shape) / octave
        images += amplitude * np.sin(2 * np.pi * (fy * y[..., None] + fx * x[..., None]) + phase)
    images += rng.normal(size=shape) * y[..., None] + rng.normal(size=shape) * x[..., None]
    images += 0.1 * rng.normal(size=images.shape)
    return images.astype(np.float32)


def _tiny(**fields: Any) -> ViTConfig:
    return dataclasses.replace(_TINY, **fields)


def _one_block(**fields: Any) -> ViTConfig:
    return _tiny(num_hidden_layers=1, **fields)


_ALL = (
    Case("rectangular", _TINY),
    # Thirteen blocks, because in lexicographic order 10 comes before 2.
    Case("deep", _tiny(num_hidden_layers=13, image_size=15, num_channels=1), seed=1),
    Case("hard-tokens", _tiny(image_size=20), seed=2, hard_tokens=True),
    # These three vary what is inside a block or after the last one, also backward. A second block would only take
    # longer to compile.
    Case("no-qkv-bias", _one_block(qkv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-5), seed=3),
    Case("one-head", _one_block(num_attention_heads=1, hidden_act="quick_gelu", num_channels=5), seed=4),
    Case("pooler", _one_block(num_labels=0, pooler=True, pooler_output_size=29, hidden_act="silu"), seed=5),
    Case("headless", _tiny(num_labels=0, num_attention_heads=11, hidden_act="relu", layer_norm_eps=1e-2), seed=6),
    Case("stored-bfloat16", _tiny(num_hidden_layers=3), seed=7, stored=ml_dtypes.bfloat16),
    # Rectangular patches whose number is not a square. FlaxViT cannot do this, so NumPy alone is the reference.
    Case("rectangular-patch", _tiny(image_size=(9, 35), patch_size=(3, 5)), seed=8),
    # One image, because a second one of this size would take as long as all other cases.
    Case("vit-b16", ViTConfig.variant("B/16", hidden_dropout_prob=0.1), batch=1, seed=9),
    Case("stored-float64", _one_block(), seed=10, stored=np.float64),
)

CASES: dict[str, Case] = {case.name: case for case in _ALL}
