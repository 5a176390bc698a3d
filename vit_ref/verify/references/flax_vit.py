"""The reference FlaxViT of transformers, observed at every site from outside.

flax's method interception sees and replaces the inputs and outputs of submodules. So transformers is neither edited nor
copied.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import linen
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import ReferenceUnavailableError, UnsupportedByReferenceError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.verify.compare.objectives import Gradients, Objective, differentiator
from vit_ref.verify.compare.trace import Tap, TappedForward, Trace, narrowed, recorder, replacements
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.references.fused import fused as fused_attention
from vit_ref.weights.layouts import FLAX
from vit_ref.weights.mapping import port

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
    ("attention", "output", "dense"): "attn.out",
    ("layernorm_after",): "norm2",
    ("intermediate", "dense"): "mlp.fc1",
    ("intermediate",): "mlp.hidden",
    ("output", "dense"): "mlp.out",
}

_ATTENTION = ("attention", "attention")
_HEADS = {(*_ATTENTION, role): f"attn.{role}" for role in ("query", "key", "value")}


def require_flaxvit() -> None:
    """Checks that the installed transformers has FlaxViT.

    Raises:
      ReferenceUnavailableError: it has not; the message says what to install.
    """
    install = "install it with: pip install 'transformers>=4.50,<5', or use the reference torch or numpy"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ReferenceUnavailableError(f"FlaxViT needs transformers, which is not installed: {install}") from None
    if int(version.split(".")[0]) >= 5:
        raise ReferenceUnavailableError(f"transformers {version} has no FlaxViT, but 4.x has it: {install}")


class FlaxViTReference:
    """`FlaxViTForImageClassification`, or `FlaxViTModel` for a model without a head.

    Args:
      config: the model's configuration.
      tensors: the tensors under Hugging Face's PyTorch names and shapes. transformers' own converter turns them into
        FlaxViT's tree, so that this package's weight map has no part in it.

    Raises:
      ReferenceUnavailableError: transformers is missing or of the wrong version.
      UnsupportedByReferenceError: FlaxViT cannot express the configuration.
    """

    name = "FlaxViT"
    foreign = False
    fused = False

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray]):
        require_flaxvit()
        import transformers

        # transformers warns that its Flax classes end with version 5, which the caller need not read each time.
        transformers.logging.set_verbosity_error()
        from transformers.models.vit import modeling_flax_vit

        self.config = config
        self._hf_config = transformers.ViTConfig(**{**config.hf_numerics(), **_square(config)})
        if config.num_labels:
            self._build: Any = modeling_flax_vit.FlaxViTForImageClassificationModule
        else:
            self._build = partial(modeling_flax_vit.FlaxViTModule, add_pooling_layer=config.pooler)
        shapes = jax.eval_shape(self.module(np.float32).init, jax.random.key(0), self._pixels(config))["params"]
        self._stand_in = SimpleNamespace(params=shapes, base_model_prefix="vit")
        self._recorders: dict[np.dtype, Callable[..., dict[str, jax.Array]]] = {}
        self._differentiators: dict[bool, dict[Any, Future[Any]]] = {False: {}, True: {}}  # by whether it is fused
        self.fill(tensors)

    def fill(self, tensors: Mapping[str, NDArray]) -> None:
        """Takes other weights. Compiled code is used again.

        Args:
          tensors: see `FlaxViTReference`; an empty mapping frees the present weights.
        """
        self.tensors = tensors
        self.params: Any = {}
        if not tensors:  # with PyTorch installed, transformers cannot convert an empty mapping
            return
        from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

        with FLOAT64.active():  # so that float64 weights survive
            self.params = jax.device_get(convert_pytorch_state_dict_to_flax(dict(tensors), self._stand_in))

    def storing(self, precision: Precision) -> FlaxViTReference:
        """Implements `Reference.storing`."""
        return FlaxViTReference(self.config, precision.rounded(self.tensors))

    def _pixels(self, config: ViTConfig) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *config.image_hw, config.num_channels), np.float32)

    def module(self, dtype: DTypeLike) -> linen.Module:
        """Returns the linen module that computes in `dtype`; apply it to `params`.

        Args:
          dtype: the dtype of the computation.
        """
        return self._build(self._hf_config, dtype=dtype)

    def trace(self, pixels: NDArray, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """Implements `Reference.trace`. Values in `replace` take the place of its own at those sites."""
        dtype = precision.dtype
        with precision.active():
            if dtype not in self._recorders:
                self._recorders[dtype] = jax.jit(recorder(self._forward_in(dtype)))
            given = narrowed(self.params, dtype), pixels.astype(dtype), replacements(replace, dtype)
            return jax.device_get(self._recorders[dtype](*given))

    def gradients(
        self, pixels: NDArray, precision: Precision, *, like: Objective | None = None
    ) -> Callable[[Objective], Gradients]:
        """Implements `Reference.gradients`, and `differentiator` for `like`.

        The weight map of FlaxViT's tree gives the gradients of parameters this package's paths.
        """
        forward, compiled = self._forward_in(precision.dtype), self._differentiators[self.fused]
        shapes = {site.name: site.shape for site in sites(self.config, len(pixels), pixels.shape[1:3])}
        differentiate = differentiator(forward, self.params, shapes, pixels, precision, like=like, compiled=compiled)

        def gradients(objective: Objective) -> Gradients:
            by_parameter, by_site, by_pixel = differentiate(objective)
            named = port(flatten_dict(by_parameter, sep="/"), self.config, FLAX, finite=False)
            if self.fused:  # probabilities do not exist, so their gradients are zeros
                by_site = {site: value for site, value in by_site.items() if not site.endswith(".attn.probs")}
            return Gradients(by_site, named, {"pixels": by_pixel})

        return gradients

    def _forward_in(self, dtype: DTypeLike) -> TappedForward:
        return lambda params, pixels, tap: self._forward(params, pixels, dtype, tap)

    def _forward(self, params: Any, pixels: jax.Array, dtype: DTypeLike, tap: Tap) -> jax.Array:
        """Runs the module and passes the value at every site through a tap.

        Values are intercepted when a submodule returns them. No submodule returns two of them. The function that
        computes the attention probabilities is wrapped while this runs. The stream between attention and MLP is
        replaced at the inputs of the second norm and the second addition. Fused attention replaces all of FlaxViT's
        attention, and has no probabilities to show.
        """
        from transformers.models.vit import modeling_flax_vit

        heads = (self.config.num_attention_heads, self.config.head_dim)
        weights = modeling_flax_vit.dot_product_attention_weights
        block = ""
        stream = None

        def attention_weights(*args: Any, **kwargs: Any) -> jax.Array:
            return tap(f"{block}.attn.probs", weights(*args, **kwargs))

        def attend(module: Any, tokens: jax.Array) -> Any:
            roles = (module.query, module.key, module.value)
            context = fused_attention(*(role(tokens).reshape(*tokens.shape[:2], *heads) for role in roles))
            return (context.reshape(tokens.shape),)

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal block, stream
            path = tuple(part for part in context.module.path if part != "vit")
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if path in _OUTSIDE:
                return tap(_OUTSIDE[path], call(*args, **kwargs))
            if path[:2] != ("encoder", "layer") or len(path) == 2:
                return call(*args, **kwargs)
            block, inside = f"block.{path[2]}", path[3:]
            if inside == ("layernorm_after",):
                stream = tap(f"{block}.attn.residual", args[0])
                args = (stream,)
            if inside == ("output",):
                args = (args[0], stream)
            output = attend(context.module, args[0]) if self.fused and inside == _ATTENTION else call(*args, **kwargs)
            if inside in ((), _ATTENTION):
                site = "attn.context" if inside else "mlp.residual"
                return (tap(f"{block}.{site}", output[0]), *output[1:])
            if inside in _HEADS:
                split = output.reshape(*output.shape[:2], *heads)
                return tap(f"{block}.{_HEADS[inside]}", split).reshape(output.shape)
            return tap(f"{block}.{_INSIDE[inside]}", output) if inside in _INSIDE else output

        with (
            mock.patch.object(modeling_flax_vit, "dot_product_attention_weights", attention_weights),
            linen.intercept_methods(intercept),
        ):
            outputs: Any = self.module(dtype).apply({"params": params}, pixels, return_dict=False)
        if self.config.num_labels:
            return outputs[0]
        return outputs[1] if self.config.pooler else tap("cls", outputs[0][:, 0])


def _square(config: ViTConfig) -> dict[str, int]:
    """Returns image and patch sizes for FlaxViT, which accepts only squares.

    FlaxViT uses the image's size only for the number of position embeddings. So a rectangle runs in it unchanged if its
    number of patches is a square.
    """
    rows, columns = config.grid()
    side = round((rows * columns) ** 0.5)
    if config.patch_hw[0] != config.patch_hw[1] or side * side != rows * columns:
        raise UnsupportedByReferenceError(
            f"FlaxViT needs square patches whose number is a square, not {rows}x{columns} patches of"
            f" {config.patch_hw} pixels"
        )
    return {"image_size": side * config.patch_hw[0], "patch_size": config.patch_hw[0]}
