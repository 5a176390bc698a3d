"""Runs a declared candidate that is a PyTorch module, and observes and changes its values through hooks."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, UndifferentiableError, first_line
from vit_ref.verify.candidates.adapters import require_known, tapping
from vit_ref.verify.candidates.casts import Casts
from vit_ref.verify.candidates.declaration import takes
from vit_ref.verify.candidates.declared import Declared
from vit_ref.verify.candidates.feeding import Arguments
from vit_ref.verify.candidates.loading import RAISED, in_one_line, load, observed, recognised
from vit_ref.verify.candidates.table import Table, counted
from vit_ref.verify.candidates.torch_casts import WithoutCasts, forgetting
from vit_ref.verify.candidates.torch_uses import Edge, find_used_once
from vit_ref.verify.compare.inputs import Inputs, is_float, map_arrays
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
    _stored: DTypeLike | None = None
    _given: Mapping[str, NDArray] = MappingProxyType({})

    def trace(self, inputs: Inputs, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """Implements `Tapped.trace`."""
        module = self._ready(precision.dtype)
        given = {site: torch.tensor(np.ascontiguousarray(value)) for site, value in (replace or {}).items()}
        recorded: Trace = {}

        def tap(site: str, value: torch.Tensor) -> torch.Tensor:
            recorded[site] = _array(value)
            return given[site].to(value) if site in given else value

        with in_one_line(self.name, "the forward pass"), torch.no_grad():
            self._forward(module, inputs, self._tensors(inputs, _like(module, precision.dtype)), tap)
        return recorded

    def outputs(
        self, batches: Sequence[Inputs], precision: Precision, *, jit: bool = True, tap: Tap | None = None
    ) -> list[NDArray]:
        """Implements `Tapped.outputs`. `jit` has no effect here."""
        module = self._ready(precision.dtype)
        outputs = []
        for batch in batches:
            with in_one_line(self.name, "the forward pass"), torch.no_grad():
                arguments = self._tensors(batch, _like(module, precision.dtype))
                before = [tensor.clone() for tensor in _leaves(arguments)]
                outputs.append(_array(self._forward(module, batch, arguments, tap)))
                written = any(
                    not torch.equal(tensor, kept) for tensor, kept in zip(_leaves(arguments), before, strict=True)
                )
                if written:
                    # The caller must see that in the batch.
                    map_arrays(_spoil, batch)
        return outputs

    def gradients(self, inputs: Inputs, precision: Precision) -> Callable[[Objective], Gradients]:
        """Implements `Reference.gradients`, for the parameters after `torch.nn.Module.to`."""
        module = self._ready(precision.dtype)
        with in_one_line(self.name, "requires_grad_ of its parameters"):
            # One by one, because a ScriptModule has no `requires_grad_` of its own.
            parameters = {name: value.requires_grad_(True) for name, value in module.named_parameters()}
        like = _like(module, precision.dtype)
        wide = torch.promote_types(like.dtype, torch.float32)
        last, shapes = self.outline.output, self.outline.shapes(inputs)

        def gradients(o: Objective) -> Gradients:
            brighter = map_arrays(lambda x: x * np.float32(o.brightness) if is_float(x) else x, inputs)
            arguments = self._tensors(brighter, like.to(wide))
            floats = [tensor.requires_grad_(True) for tensor in _leaves(arguments) if tensor.is_floating_point()]
            labels, cotangent = (torch.tensor(value, device=like.device) for value in (o.labels, o.cotangent))
            perturbations: dict[str, torch.Tensor] = {}

            def tap(site: str, value: torch.Tensor) -> torch.Tensor:
                if site == last and not value.requires_grad:
                    raise UndifferentiableError(
                        "its output has no gradient: it may run under torch.no_grad; remove that from the forward pass"
                    )
                if tuple(value.shape) != shapes[site]:
                    return value
                # One zero in every place takes no memory.
                zero = torch.zeros((), dtype=wide, device=value.device).expand(value.shape)
                perturbations[site] = zero.requires_grad_(True)
                return value + perturbations[site].to(value.dtype)

            with in_one_line(self.name, "the forward pass with gradients"), torch.enable_grad():
                # Multiplied by one, because a candidate that writes into its inputs must not meet a leaf.
                met = _map(lambda x: x.to(like.dtype) * 1 if x.is_floating_point() else x, arguments)
                output = self._forward(module, inputs, met, tap).to(wide)
                require_shape(output.shape, o.cotangent.shape)
                loss = torch.nn.functional.cross_entropy(output.flatten(0, -2), labels.flatten())
                objective = o.loss_weight * loss + (cotangent.to(wide) * output).sum()
            leaves = [*perturbations.values(), *parameters.values(), *floats]
            try:
                found = torch.autograd.grad(objective, leaves, materialize_grads=True)
            except RAISED as error:
                raise UndifferentiableError(f"torch cannot differentiate it: {first_line(error)}") from error
            with in_one_line(self.name, "reading its gradients"):
                arrays = iter([_numpy(gradient.cpu().contiguous()) for gradient in found])
                by_site = {site: next(arrays) for site in perturbations}
                by_name = {name: next(arrays) for name in parameters}
                by_site = {site: gradient for site, gradient in by_site.items() if site not in self.fixed}
                by_float = arrays
                by_argument = _map(lambda x: next(by_float) if x.is_floating_point() else None, arguments)
                by_fed = by_argument if isinstance(inputs, Mapping) else self._back(by_argument)
                by_input = self.by_input(inputs, by_fed)
                return Gradients(by_site, recognised(self._candidate, self.outline, by_name), by_input)

        return gradients

    def storing(self, precision: Precision) -> TorchCandidate:
        """Implements `Reference.storing`. Below float64, `torch.nn.Module.to` rounds the parameters itself."""
        narrow = copy.copy(self)
        narrow._stored = precision.stored
        return narrow

    def with_parameters(self, given: Mapping[str, NDArray]) -> TorchCandidate:
        """Returns the same candidate with other values of some parameters.

        Args:
          given: values by name, see `parameters`.
        """
        changed = copy.copy(self)
        changed._given = given
        return changed

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
        if not self._loaded or (converts and np.dtype(dtype) not in self._loaded):
            self._loaded = {np.dtype(dtype): load(self._candidate, self._checkpoint, dtype)}
        (loaded,) = self._loaded.values()
        self._require_values(loaded)
        # Without no_grad, the parameters of a ScriptModule's copy would not be leaves.
        with in_one_line(self.name, "copying it"), torch.no_grad(), _results_copied():
            module = copy.deepcopy(loaded)
        if self._stored is not None:
            module = module.to(_DTYPES[np.dtype(self._stored).name])
        if not converts or self._stored is not None:
            with in_one_line(self.name, f".to(torch.{np.dtype(dtype).name})"):
                module = _norms_anew(module.to(_DTYPES[np.dtype(dtype).name]))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if (value := self._given.get(counted(name))) is not None:
                    parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
        return module

    def _require_values(self, module: torch.nn.Module) -> None:
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if tensor.is_meta:
                raise CandidateError(
                    f"{self.name}: {name!r} is on the device 'meta' and has no values: load the checkpoint into it on"
                    " another device"
                )

    def _used_once(self, inputs: Inputs, sites: frozenset[str]) -> frozenset[str]:
        module = self._ready(np.float64)
        marked: dict[str, Edge] = {}

        def tap(site: str, value: torch.Tensor) -> torch.Tensor:
            if site not in sites or value.grad_fn is None:
                return value
            marked[site] = value.grad_fn, value.output_nr
            return value.view_as(value)

        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        try:
            with torch.enable_grad():
                for parameter in frozen:
                    parameter.requires_grad_(True)
                output = self._forward(module, inputs, self._tensors(inputs, _like(module, np.float64)), tap)
        except RAISED:  # the comparison of gradients reports it
            return frozenset()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return sites & find_used_once(output, marked)

    def _tensors(self, inputs: Inputs, like: torch.Tensor) -> Arguments:
        """Returns the arguments made of the inputs: floats in the dtype of `like`, and all on its device."""
        fed = self.feed(inputs)
        if isinstance(fed, Arguments):
            return _map(lambda x: torch.tensor(x).to(like if is_float(x) else like.device), fed)
        images = torch.tensor(fed).to(like)
        return Arguments((images.permute(0, 3, 1, 2).contiguous() if self._channels_first else images,), {})

    def _back(self, by_argument: Arguments) -> NDArray:
        (images,) = by_argument.args
        return images.transpose(0, 2, 3, 1) if self._channels_first else images

    def _forward(self, module: torch.nn.Module, inputs: Inputs, arguments: Arguments, tap: Tap | None) -> torch.Tensor:
        call = self._candidate.call
        args, kwargs = arguments
        table = self.tables(inputs) if tap else self._table({}, inputs)

        def run(table: Table, tap: Tap | None) -> Any:
            named = tapping(call or module.forward, table, tap)
            # A model that passes its values through a tap would show them twice.
            modules = {} if named else {counted(path): part for path, part in module.named_modules()}
            with _watching(modules, table, tap):
                returned = call(module, *args, **kwargs, **named) if call else module(*args, **kwargs, **named)
            require_known(table, table.met if named else modules, returned, module)
            return returned

        def passed(tap: Tap | None) -> torch.Tensor:
            return observed(self._candidate, self.outline, run, table, tap)

        in_float64 = _dtype(module, arguments) == torch.float64
        with forgetting(module):
            output = self._in_float64(passed, tap) if in_float64 else passed(tap)
        if tap:
            self.fixed, self.parts = frozenset(table.fixed), table.parts
        return output

    @staticmethod
    def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
        # torch's annotation has a third value, which it returns only on request.
        both: Any = torch.func.vjp(function, value)
        picked, pull_back = both
        return picked, lambda cotangent: pull_back(cotangent)[0]

    def _undoing(self, casts: Casts) -> contextlib.AbstractContextManager[Any]:
        return WithoutCasts(casts)


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


def _leaves(arguments: Arguments) -> list[torch.Tensor]:
    return [*arguments.args, *arguments.kwargs.values()]


def _map(function: Callable[[Any], Any], arguments: Arguments) -> Arguments:
    return Arguments(
        tuple(map(function, arguments.args)), {name: function(value) for name, value in arguments.kwargs.items()}
    )


def _dtype(module: torch.nn.Module, arguments: Arguments) -> torch.dtype | None:
    """Returns the dtype of a pass: that of its float arguments, or of the module if there are none."""
    floats = [tensor for tensor in (*_leaves(arguments), *module.parameters()) if tensor.is_floating_point()]
    return floats[0].dtype if floats else None


def _spoil(value: NDArray) -> NDArray:
    """Changes an array in place."""
    value[...] = ~value if value.dtype == np.bool_ else value + 1
    return value


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
    """Returns a copy on the host, because a candidate may change the tensor in place later."""
    return _numpy(value.detach().cpu().clone(memory_format=torch.contiguous_format))


def _numpy(value: torch.Tensor) -> NDArray:
    """Returns a tensor on the host as an array that shares its memory.

    NumPy has no name for bfloat16, but ml_dtypes has a type.
    """
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()
