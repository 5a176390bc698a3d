"""Runs a declared candidate that is a PyTorch module, and observes and changes its values through hooks."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from jax.typing import DTypeLike
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from vit_ref.errors import CandidateError, UndifferentiableError, first_line
from vit_ref.model.sites import output_site, sites
from vit_ref.verify.candidates.adapters import require_known, tapping
from vit_ref.verify.candidates.casts import Casts
from vit_ref.verify.candidates.declaration import takes
from vit_ref.verify.candidates.declared import Declared
from vit_ref.verify.candidates.loading import RAISED, in_one_line, load, observed, recognised
from vit_ref.verify.candidates.table import Table, counted
from vit_ref.verify.compare.objectives import Gradients, Objective, require_shape
from vit_ref.verify.compare.trace import Tap, Trace
from vit_ref.verify.precision import Precision


class TorchCandidate(Declared):
    """A candidate whose loader returns a `torch.nn.Module`; see `Runnable`.

    It runs as it was loaded, on the device of its parameters. The loader must put it in evaluation mode, because that
    is part of what is tested.
    """

    compiles = False
    foreign = True

    def trace(self, pixels: NDArray, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """See `Tapped.trace`."""
        module = self._ready(precision.dtype)
        given = {site: torch.tensor(value) for site, value in (replace or {}).items()}
        recorded: Trace = {}

        def tap(site: str, value: torch.Tensor) -> torch.Tensor:
            recorded[site] = _array(value)
            return given[site].to(value) if site in given else value

        with in_one_line(self.name, "the forward pass"), torch.no_grad():
            self._forward(module, self._arranged(torch.tensor(pixels).to(_like(module, precision.dtype))), tap)
        return recorded

    def outputs(
        self, batches: Sequence[NDArray], precision: Precision, *, jit: bool = True, tap: Tap | None = None
    ) -> list[NDArray]:
        """See `Tapped.outputs`; `jit` has no effect here."""
        module = self._ready(precision.dtype)
        outputs = []
        for batch in batches:
            with in_one_line(self.name, "the forward pass"), torch.no_grad():
                images = self._arranged(torch.tensor(batch).to(_like(module, precision.dtype)))
                outputs.append(_array(self._forward(module, images, tap)))
                # If the candidate wrote into its images, the caller must see that in the batch.
                batch[...] = _array(images.permute(0, 2, 3, 1) if self._channels_first else images)
        return outputs

    def gradients(self, pixels: NDArray, precision: Precision) -> Callable[[Objective], Gradients]:
        """See `Reference.gradients`; the parameters are those after `torch.nn.Module.to`."""
        module = self._ready(precision.dtype)
        with in_one_line(self.name, "requires_grad_ of its parameters"):
            # One by one, because a ScriptModule has no `requires_grad_` of its own.
            parameters = {name: value.requires_grad_(True) for name, value in module.named_parameters()}
        like = _like(module, precision.dtype)
        wide = torch.promote_types(like.dtype, torch.float32)
        last = output_site(self.config)
        shapes = {site.name: site.shape for site in sites(self.config, len(pixels), pixels.shape[1:3])}

        def gradients(o: Objective) -> Gradients:
            images = torch.tensor(pixels * np.float32(o.brightness)).to(like.device, wide).requires_grad_(True)
            labels, cotangent = (torch.tensor(value, device=like.device) for value in (o.labels, o.cotangent))
            perturbations: dict[str, torch.Tensor] = {}

            def tap(site: str, value: torch.Tensor) -> torch.Tensor:
                if site == last and not value.requires_grad:
                    raise UndifferentiableError(
                        "its output has no gradient: it may run under torch.no_grad; remove that from the forward pass"
                    )
                if tuple(value.shape) != shapes[site]:
                    return value
                perturbations[site] = torch.zeros(value.shape, dtype=wide, device=value.device, requires_grad=True)
                return value + perturbations[site].to(value.dtype)

            with in_one_line(self.name, "the forward pass with gradients"), torch.enable_grad():
                # Multiplied by one, because a candidate that writes into its images must not meet a leaf.
                output = self._forward(module, self._arranged(images.to(like.dtype) * 1), tap).to(wide)
                require_shape(output.shape, o.cotangent.shape)
                loss = torch.nn.functional.cross_entropy(output, labels)
                objective = o.loss_weight * loss + (cotangent.to(wide) * output).sum()
            leaves = [*perturbations.values(), *parameters.values(), images]
            try:
                found = torch.autograd.grad(objective, leaves, materialize_grads=True)
            except RAISED as error:
                raise UndifferentiableError(f"torch cannot differentiate it: {first_line(error)}") from error
            with in_one_line(self.name, "reading its gradients"):
                names = iter(found)
                by_site = {site: _array(next(names)) for site in perturbations}
                by_name = {name: _array(next(names)) for name in parameters}
                met = {site: gradient for site, gradient in by_site.items() if site not in self.fixed}
                return Gradients(met, recognised(self._candidate, self.config, by_name), _array(next(names)))

        return gradients

    def storing(self, precision: Precision) -> TorchCandidate:
        """See `Reference.storing`. Returns itself, because `torch.nn.Module.to` rounds its parameters to any dtype."""
        return self

    def parameters(self) -> dict[str, NDArray]:
        """Returns the candidate's parameters in float64, on the host, by its own paths."""
        module = self._ready(np.float64)
        with in_one_line(self.name, "reading its parameters"):
            return {counted(name): _array(value) for name, value in module.named_parameters()}

    @property
    def _channels_first(self) -> bool:
        return self._candidate.channels_first is not False

    def _ready(self, dtype: DTypeLike) -> torch.nn.Module:
        """Returns a copy of the module that computes in `dtype`, so that changes to it stay in the copy."""
        converts = takes(self._candidate.load, "dtype")
        if self._loaded is None or (converts and self._loaded[0] != np.dtype(dtype)):
            self._loaded = np.dtype(dtype), load(self._candidate, self._checkpoint, dtype)
        self._require_values(self._loaded[1])
        # Without no_grad, the parameters of a ScriptModule's copy would not be leaves.
        with in_one_line(self.name, "copying it"), torch.no_grad(), _results_copied():
            module = copy.deepcopy(self._loaded[1])
        with in_one_line(self.name, f".to(torch.{np.dtype(dtype).name})"):
            return module if converts else _norms_anew(module.to(_DTYPES[np.dtype(dtype).name]))

    def _require_values(self, module: torch.nn.Module) -> None:
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if tensor.is_meta:
                raise CandidateError(
                    f"{self.name}: {name!r} is on the device 'meta' and has no values: load the checkpoint into it on"
                    " another device"
                )

    def _arranged(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2).contiguous() if self._channels_first else images

    def _forward(self, module: torch.nn.Module, images: torch.Tensor, tap: Tap | None) -> torch.Tensor:
        call = self._candidate.call
        batch, *rest = images.shape
        height, width = rest[1:] if self._channels_first else rest[:2]
        shape = batch, height, width
        table = self.tables(shape) if tap else self._table({}, shape)

        def run(table: Table, tap: Tap | None) -> Any:
            named = tapping(call or module.forward, table, tap)
            # A model that passes its values through a tap would show them twice.
            modules = {} if named else {counted(path): part for path, part in module.named_modules()}
            with _watching(modules, table, tap):
                returned = call(module, images, **named) if call else module(images, **named)
            require_known(table, table.met if named else modules, returned, module)
            return returned

        def passed(tap: Tap | None) -> torch.Tensor:
            return observed(self._candidate, self.config, run, table, tap)

        output = self._in_float64(passed, tap) if images.dtype == torch.float64 else passed(tap)
        if tap:
            self.fixed = frozenset(table.fixed)
        return output

    @staticmethod
    def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
        # torch's annotation has a third value, which it returns only on request.
        both: Any = torch.func.vjp(function, value)
        picked, pull_back = both
        return picked, lambda cotangent: pull_back(cotangent)[0]

    def _undoing(self, casts: Casts) -> contextlib.AbstractContextManager[Any]:
        return _WithoutCasts(casts)


class _WithoutCasts(TorchDispatchMode):
    """Keeps PyTorch from casting float64 to float32; see the module `casts`.

    It sees the operations below PyTorch's functions. There `x.float()`, `softmax(x, dtype=torch.float32)` and
    `x.mean(dtype=torch.float32)` all name the dtype.
    """

    def __init__(self, casts: Casts):
        super().__init__()
        self._casts = casts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if kwargs.get("dtype") == torch.float32 and getattr(first, "dtype", None) == torch.float64:
            self._casts.number += 1
            kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)


@contextlib.contextmanager
def _watching(modules: Mapping[str, torch.nn.Module], table: Table, tap: Tap | None) -> Iterator[None]:
    if tap is None:
        yield
        return

    def entering(path: str, _: Any, args: Any, kwargs: Any) -> Any:
        return table.at_input(path, args, kwargs, tap)

    def leaving(path: str, _: Any, args: Any, output: Any) -> Any:
        return table.at_output(path, output, tap)

    with contextlib.ExitStack() as stack:
        for path in table.paths & modules.keys():
            hook = modules[path].register_forward_pre_hook(partial(entering, path), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(modules[path].register_forward_hook(partial(leaving, path)).remove)
        yield


@contextlib.contextmanager
def _results_copied() -> Iterator[None]:
    """Lets `copy.deepcopy` copy a computed tensor, which PyTorch refuses.

    A module may hold such a tensor: `weight_norm` keeps the weight that it computes before each call, and a layer may
    keep its last attention map. The copy has the same values and no history.
    """
    copied = torch.Tensor.__deepcopy__

    def detached(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if tensor.is_leaf:
            return copied(tensor, memo)
        memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]

    with mock.patch.object(torch.Tensor, "__deepcopy__", detached):
        yield


def _norms_anew(module: torch.nn.Module) -> torch.nn.Module:
    """Computes each norm that `weight_norm` took of a float32 weight again, in the module's dtype.

    A norm that is only widened keeps its float32 rounding. The weight computed from it would then differ from the
    checkpoint's in float64. A norm that is off by more than that rounding stays as it is.
    """
    parameters = dict(module.named_parameters())
    for name, norm in parameters.items():
        weight = parameters.get(re.sub(r"_g$", "_v", re.sub(r"original0$", "original1", name)))
        if weight is None or weight is norm or (norm.ndim and norm.ndim != weight.ndim):
            continue
        axes = [axis for axis in range(weight.ndim) if not norm.ndim or norm.shape[axis] == 1]
        with torch.no_grad():
            anew = torch.linalg.vector_norm(weight, dim=axes, keepdim=norm.ndim > 0)
            rounded = (norm - anew).abs() <= _NORM_ROUNDING * anew
            norm.copy_(torch.where(rounded, anew, norm))
    return module


# The float32 norm of some thousand elements is this close to the right one.
_NORM_ROUNDING = 2**-21

_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


def _like(module: torch.nn.Module, dtype: DTypeLike) -> torch.Tensor:
    """Returns an empty tensor of the dtype on the module's device, for `Tensor.to`."""
    device = next((parameter.device for parameter in module.parameters()), None)
    return torch.empty(0, dtype=_DTYPES[np.dtype(dtype).name], device=device)


def _array(value: torch.Tensor) -> NDArray:
    """Returns a copy on the host, because a candidate may change the tensor in place later.

    NumPy has no name for bfloat16, but ml_dtypes has a type.
    """
    value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()
