"""The reference in PyTorch: the ViT of transformers 4 and 5, observed at every site by forward hooks.

Unlike FlaxViT it accepts rectangular images and patches. Autograd gives the gradient at a site without a perturbation,
because a hook sees the very tensor that the rest of the model computes with. It runs on the CPU.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import InputError, ReferenceUnavailableError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import Site, output_site, sites
from vit_ref.verify.compare.objectives import Gradients, Objective
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.environment import products
from vit_ref.verify.precision import Precision
from vit_ref.weights.mapping import detect, port

# Picks a value from a module's arguments and from what it returns.
Pick = Callable[[tuple[Any, ...], Any], Any]


class _Seen(NamedTuple):
    """The module at which a site's value is seen, and how to pick the value."""

    module: str
    pick: Pick = lambda arguments, returned: returned


def _input_of(module: str) -> _Seen:
    return _Seen(module, lambda arguments, returned: arguments[0])


_OUTSIDE = {
    "patches": _Seen("embeddings.patch_embeddings"),
    "embeddings": _Seen("embeddings"),
    "norm": _Seen("layernorm"),
    "cls": _Seen("layernorm", lambda arguments, returned: returned[:, 0]),
    "pooler": _Seen("pooler"),
    "logits": _Seen("classifier"),
}
_NORMS = {
    "norm1": _Seen("layernorm_before"),
    "attn.residual": _input_of("layernorm_after"),
    "norm2": _Seen("layernorm_after"),
    "mlp.residual": _Seen(""),
}
# For each of the two versions: the path of the blocks, and what is seen in a block. Attention returns its probabilities
# beside its output.
_BLOCKS: dict[str, dict[str, _Seen]] = {
    "encoder.layer": {
        **_NORMS,
        "attn.query": _Seen("attention.attention.query"),
        "attn.key": _Seen("attention.attention.key"),
        "attn.value": _Seen("attention.attention.value"),
        "attn.probs": _Seen("attention.attention", lambda arguments, returned: returned[1]),
        "attn.context": _input_of("attention.output.dense"),
        "attn.out": _Seen("attention.output.dense"),
        "mlp.fc1": _Seen("intermediate.dense"),
        "mlp.hidden": _input_of("output.dense"),
        "mlp.out": _Seen("output.dense"),
    },
    "layers": {
        **_NORMS,
        "attn.query": _Seen("attention.q_proj"),
        "attn.key": _Seen("attention.k_proj"),
        "attn.value": _Seen("attention.v_proj"),
        "attn.probs": _Seen("attention", lambda arguments, returned: returned[1]),
        "attn.context": _input_of("attention.o_proj"),
        "attn.out": _Seen("attention.o_proj"),
        "mlp.fc1": _Seen("mlp.fc1"),
        "mlp.hidden": _input_of("mlp.fc2"),
        "mlp.out": _Seen("mlp.fc2"),
    },
}


def require_torch() -> None:
    """Checks that PyTorch and its ViT in transformers are installed.

    Raises:
      ReferenceUnavailableError: they are not; the message says what to install.
    """
    # Before 4.57 attention does not return its probabilities by default.
    for package, least in (("torch", (2, 4)), ("transformers", (4, 57))):
        oldest = ".".join(map(str, least))
        install = f"install it with: pip install '{package}>={oldest}'"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ReferenceUnavailableError(
                f"the reference torch needs {package}, which is not installed: {install}"
            ) from None
        if tuple(int(part) for part in version.split(".")[:2]) < least:
            raise ReferenceUnavailableError(
                f"the reference torch needs {package} {oldest} or later, found {version}: {install}"
            )


class TorchViTReference:
    """`ViTForImageClassification` in PyTorch, or `ViTModel` for a model without a head.

    Half precision is autocast's, as in FlaxViT: parameters, token stream and LayerNorm are in float32, matrix products
    in `dtype`. `model.to(bfloat16)` would also round the stream, twice per block. Its error would be too large to
    measure a better candidate with.

    Args:
      config: the model's configuration.
      tensors: the tensors under the names of transformers 4. Version 5 renames them itself, so that this package's
        weight map has no part in it.

    Raises:
      ReferenceUnavailableError: PyTorch or transformers is missing or too old.
      InputError: the tensors are not exactly the model's.
    """

    name = "PyTorch"
    foreign = True
    fused = False

    def __init__(self, config: ViTConfig, tensors: Mapping[str, NDArray]):
        require_torch()
        self.config = config
        self.tensors = tensors
        self._model(np.float32)  # so that tensors that do not fit are reported now

    def _model(self, dtype: DTypeLike) -> Any:
        """Returns the module with parameters of `dtype`, in evaluation mode."""
        import torch
        import transformers

        # transformers would print a table with the content of `info`, and a progress bar for milliseconds.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind: Any = transformers.ViTForImageClassification if self.config.num_labels else transformers.ViTModel
        model, info = kind.from_pretrained(
            None,
            config=transformers.ViTConfig(**self.config.hf_numerics()),
            state_dict={name: torch.from_numpy(np.array(tensor, dtype)) for name, tensor in self.tensors.items()},
            dtype=_torch(dtype),
            attn_implementation="sdpa" if self.fused else "eager",  # eager attention forms the probabilities
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
            **({} if self.config.num_labels else {"add_pooling_layer": self.config.pooler}),
        )
        faults = [f"{kind.replace('_keys', '')} {sorted(map(str, found))}" for kind, found in info.items() if found]
        if faults:
            raise InputError(
                f"the tensors do not fit PyTorch's ViT: {', '.join(faults)}: use the reference flax or numpy"
            )
        return model

    def storing(self, precision: Precision) -> TorchViTReference:
        """See `Reference.storing`."""
        return TorchViTReference(self.config, precision.rounded(self.tensors))

    def trace(self, pixels: NDArray, precision: Precision) -> Trace:
        """See `Reference.trace`.

        Raises:
          InputError: jax rounds the operands of float32 products on this device, and PyTorch does not.
        """
        import torch

        _require_whole_products(precision)
        dtype = precision.dtype
        wide = np.promote_types(dtype, np.float32)
        with torch.no_grad():
            _, observed = self._forward(self._model(wide), torch.from_numpy(pixels.astype(wide)), dtype)
        return self._named(observed, len(pixels))

    def gradients(self, pixels: NDArray, precision: Precision) -> Callable[[Objective], Gradients]:
        """See `Reference.gradients`. The weight map of PyTorch's names gives those of parameters this package's paths.

        Raises:
          InputError: see `trace`.
        """
        import torch

        _require_whole_products(precision)
        dtype = precision.dtype
        wide = np.promote_types(dtype, np.float32)
        model = self._model(wide)
        parameters = dict(model.named_parameters())

        def gradients(objective: Objective) -> Gradients:
            images = torch.from_numpy((pixels * np.float32(objective.brightness)).astype(wide)).requires_grad_()
            output, observed = self._forward(model, images, dtype)
            output = output.to(_torch(wide))
            loss = torch.nn.functional.cross_entropy(output, torch.from_numpy(objective.labels))
            product = torch.sum(torch.from_numpy(objective.cotangent.astype(wide)) * output)
            # If the output does not depend on a tensor, this raises an error and does not return zeros.
            *found, by_pixel = torch.autograd.grad(
                objective.loss_weight * loss + product, [*observed.values(), *parameters.values(), images]
            )
            by_site = dict(zip(observed, found, strict=False))
            by_name = {name: _array(x) for name, x in zip(parameters, found[len(observed) :], strict=True)}
            by_parameter = port(by_name, self.config, detect(by_name), finite=False)
            return Gradients(self._named(by_site, len(pixels)), by_parameter, {"pixels": _array(by_pixel)})

        return gradients

    def _forward(self, model: Any, pixels: Any, dtype: DTypeLike) -> tuple[Any, dict[str, Any]]:
        """Runs the model on pixels (B, height, width, C), and returns its output and the tensor at every site."""
        import torch

        observed: dict[str, Any] = {}

        def hook(site: str, pick: Pick) -> Callable[..., None]:
            def keep(module: Any, arguments: tuple[Any, ...], returned: Any) -> None:
                value = pick(arguments, returned)
                if value is not None:  # fused attention returns None instead of its probabilities
                    observed[site] = value

            return keep

        with ExitStack() as stack:
            for site, module, pick in _places(model, sites(self.config, 1)):
                stack.enter_context(module.register_forward_hook(hook(site, pick)))
            stack.enter_context(_softmax_in_float64())
            if np.dtype(dtype).itemsize == 2:
                stack.enter_context(torch.autocast("cpu", _torch(dtype)))
            model(pixels.permute(0, 3, 1, 2))
        return observed[output_site(self.config)], observed

    def _named(self, observed: Mapping[str, Any], batch: int) -> dict[str, NDArray]:
        heads = (batch, -1, self.config.num_attention_heads, self.config.head_dim)
        split = (".query", ".key", ".value")
        return {
            site: _array(value).reshape(heads) if site.endswith(split) else _array(value)
            for site, value in observed.items()
        }


def _places(model: Any, wanted: tuple[Site, ...]) -> Iterator[tuple[str, Any, Pick]]:
    """Yields every site with the module at which it is seen, and how to pick the value."""
    modules = {name.removeprefix("vit."): module for name, module in model.named_modules()}
    blocks = next((path for path in _BLOCKS if path in modules), None)
    if blocks is None:
        version = importlib.metadata.version("transformers")
        raise ReferenceUnavailableError(
            f"the ViT of transformers {version} has an unknown structure: install another version"
        )
    for site in wanted:
        if not site.name.startswith("block."):
            seen, path = _OUTSIDE[site.name], ""
        else:
            _, block, inside = site.name.split(".", 2)
            seen, path = _BLOCKS[blocks][inside], f"{blocks}.{block}"
        yield site.name, modules[f"{path}.{seen.module}".strip(".")], seen.pick


@contextmanager
def _softmax_in_float64() -> Iterator[None]:
    """Keeps the softmax of attention in float64 within the context. transformers always rounds it to float32.

    The rounding would cost the oracle nine digits, and the dtype would not show it, because the probabilities are
    widened to float64 again.
    """
    import torch

    softmax = torch.nn.functional.softmax

    def as_given(x: Any, dim: int, dtype: Any = None) -> Any:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    with mock.patch.object(torch.nn.functional, "softmax", as_given):
        yield


def _torch(dtype: DTypeLike) -> Any:
    import torch

    return getattr(torch, np.dtype(dtype).name)


def _array(tensor: Any) -> NDArray:
    """Returns a tensor as a NumPy array. For bfloat16 NumPy uses the type of ml_dtypes."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _require_whole_products(precision: Precision) -> None:
    # This reference computes on the CPU. A GPU's error in TF32 is a thousand times larger for the same products.
    with precision.active():
        here = products() if precision.dtype == np.float32 else "float32"
    if here != "float32":
        # Not UnsupportedByReferenceError, which would skip the check: nothing would have been verified.
        raise InputError(
            f"PyTorch computes unrounded float32 products, but this device rounds to {here}: use the reference flax,"
            " the reference numpy (forward only), or the precision float32"
        )
