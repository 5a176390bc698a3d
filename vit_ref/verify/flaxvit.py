"""The reference that nobody here wrote: transformers' FlaxViT, observed at every site from outside.

flax's method interception sees each submodule's inputs and outputs, so transformers is neither edited nor copied.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import linen
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.errors import InputError
from vit_ref.verify.trace import Trace, precision_of

# Submodule path -> site of its output, outside the blocks and inside one.
_OUTSIDE = {
    ("embeddings", "patch_embeddings"): "patches",
    ("embeddings",): "embeddings",
    ("layernorm",): "norm",
    ("pooler",): "pooler",
    ("classifier",): "logits",
}
_INSIDE = {
    ("layernorm_before",): "norm1",
    ("attention", "attention", "query"): "attn.query",
    ("attention", "attention", "key"): "attn.key",
    ("attention", "attention", "value"): "attn.value",
    ("attention", "output", "dense"): "attn.out",
    ("layernorm_after",): "norm2",
    ("intermediate", "dense"): "mlp.fc1",
    ("intermediate",): "mlp.hidden",
    ("output", "dense"): "mlp.out",
}


class ReferenceUnavailableError(InputError):
    """The reference is not installed, or not in a version that has it."""


class UnsupportedByReferenceError(InputError):
    """The reference cannot build this configuration, so only the NumPy oracle can judge it."""


def require_flaxvit() -> None:
    """Raises `ReferenceUnavailableError`, saying what to install, where transformers has no FlaxViT."""
    install = "install it with: pip install 'transformers>=4.50,<5'"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ReferenceUnavailableError(f"parity needs transformers, which is not installed: {install}") from None
    if int(version.split(".")[0]) >= 5:
        raise ReferenceUnavailableError(f"transformers {version} has no FlaxViT, 4.x has: {install}")


class FlaxViTReference:
    """`FlaxViTForImageClassification`, or `FlaxViTModel` for a model without a head.

    Args:
      config: the model's configuration.
      tensors: Hugging Face's PyTorch names and shapes. transformers' own converter turns them into FlaxViT's tree, so
        that this package's weight map has no part in it.

    Raises:
      ReferenceUnavailableError: transformers is missing or of the wrong version.
      UnsupportedByReferenceError: FlaxViT cannot express the configuration.
    """

    name = "FlaxViT"

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray]):
        require_flaxvit()
        import transformers

        # Its notice that Flax classes end with transformers 5 is why the NumPy oracle exists; once is enough.
        transformers.logging.set_verbosity_error()
        from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax
        from transformers.models.vit import modeling_flax_vit

        self.config = config
        self._hf_config = transformers.ViTConfig(**{**config.to_hf(), **_square(config)})
        if config.num_labels:
            self._build: Any = modeling_flax_vit.FlaxViTForImageClassificationModule
        else:
            self._build = partial(modeling_flax_vit.FlaxViTModule, add_pooling_layer=config.pooler)
        shapes = jax.eval_shape(self.module(np.float32).init, jax.random.key(0), self._pixels(config))["params"]
        stand_in = SimpleNamespace(params=shapes, base_model_prefix="vit")
        self.params = convert_pytorch_state_dict_to_flax(dict(tensors), stand_in)

    def _pixels(self, config: ViTConfig) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *config.image_hw, config.num_channels), np.float32)

    def module(self, dtype: DTypeLike) -> linen.Module:
        """The linen module that computes in `dtype`; apply it to `params`."""
        return self._build(self._hf_config, dtype=dtype)

    def trace(self, pixels: NDArray, dtype: DTypeLike) -> Trace:
        """See `Implementation.trace`."""
        module = self.module(dtype)

        def run(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
            observed: dict[str, jax.Array] = {}
            with linen.intercept_methods(self._observer(observed)):
                module.apply({"params": params}, pixels, output_attentions=True)
            return observed

        with precision_of(dtype):
            return jax.device_get(jax.jit(run)(self.params, pixels.astype(dtype)))

    def _observer(self, observed: dict[str, jax.Array]) -> Any:
        heads = (self.config.num_attention_heads, self.config.head_dim)

        def observe(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = call(*args, **kwargs)
            path = tuple(part for part in context.module.path if part != "vit")
            if context.method_name != "__call__":
                return output
            if path in _OUTSIDE:
                observed[_OUTSIDE[path]] = output
            elif path[:2] == ("encoder", "layer") and len(path) > 2:
                block, inside = f"block.{path[2]}", path[3:]
                if inside == ():
                    observed[f"{block}.mlp.residual"] = output[0]
                elif inside == ("attention", "attention"):
                    observed[f"{block}.attn.context"], observed[f"{block}.attn.probs"] = output
                elif inside in _INSIDE:
                    site = _INSIDE[inside]
                    split = site in ("attn.query", "attn.key", "attn.value")
                    observed[f"{block}.{site}"] = output.reshape(*output.shape[:2], *heads) if split else output
                if inside == ("layernorm_after",):
                    observed[f"{block}.attn.residual"] = args[0]
            return output

        return observe


def _square(config: ViTConfig) -> dict[str, int]:
    """The image and patch sizes to tell FlaxViT, which knows squares only.

    It uses the image's size for nothing but the number of position embeddings, so a rectangle of as many patches as
    some square runs in it unchanged.
    """
    rows, columns = config.grid()
    side = round((rows * columns) ** 0.5)
    if config.patch_hw[0] != config.patch_hw[1] or side * side != rows * columns:
        raise UnsupportedByReferenceError(
            f"FlaxViT takes square patches in a square number, not {rows}x{columns} patches of {config.patch_hw} pixels"
        )
    return {"image_size": side * config.patch_hw[0], "patch_size": config.patch_hw[0]}
