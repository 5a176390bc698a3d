"""Undoes the casts to float32 of a PyTorch module that runs in float64; see the module `casts`."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vit_ref.verify.candidates.casts import Casts


class WithoutCasts(TorchDispatchMode):
    """A mode of PyTorch in which float64 tensors, and numbers, are not cast to float32.

    It sees the operations below PyTorch's functions. There `x.float()`, `softmax(x, dtype=torch.float32)` and
    `torch.arange(n, dtype=torch.float32)` all name the dtype. A tensor that is float32 already stays so, such as a
    constant that was computed when the module was made.
    """

    def __init__(self, casts: Casts):
        super().__init__()
        self._casts = casts

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if kwargs.get("dtype") == torch.float32 and _narrows(first):
            # Integers are as exact in float32.
            self._casts.number += not _is_exact(function, first)
            kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)


def _is_exact(function: Any, first: Any) -> bool:
    """Tells whether float32 holds the result exactly, as it holds integers and zeros."""
    if isinstance(first, torch.Tensor):
        return not first.is_floating_point()
    return function.overloadpacket in _CONSTANT


_CONSTANT = (torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.empty)


def _narrows(first: Any) -> bool:
    return not isinstance(first, torch.Tensor) or first.dtype == torch.float64 or not first.dtype.is_floating_point


@contextlib.contextmanager
def forgetting(module: torch.nn.Module) -> Iterator[None]:
    """Empties the caches of the functions in the packages of a module and of its submodules, before and after a pass.

    DINOv3 caches the positions of its patches by their nominal dtype. Without this, a pass in float32 would read the
    positions that a pass in float64 without casts left there, and the reverse.

    Args:
      module: the module.
    """
    # A person's own class may hold a model of transformers.
    packages = {type(part).__module__.partition(".")[0] for part in module.modules()}
    _forget(packages)
    try:
        yield
    finally:
        _forget(packages)


def _forget(packages: Collection[str]) -> None:
    models = tuple(f"{package}.models." for package in packages)
    for name in [name for name in sys.modules if name.startswith(models)]:
        for cached in _caches_of(name):
            cached.cache_clear()


@functools.cache
def _caches_of(module: str) -> tuple[Any, ...]:
    """Returns the cached functions of a module, including those that a decorator hides."""
    defined = [value for value in vars(sys.modules[module]).values() if getattr(value, "__module__", "") == module]
    methods = [each for value in defined if isinstance(value, type) for each in vars(value).values()]
    return tuple(found for value in (*defined, *methods) for found in _within(value, depth=3))


def _within(value: Any, depth: int) -> Iterator[Any]:
    if type(value) is functools._lru_cache_wrapper:
        yield value
    elif isinstance(value, types.FunctionType) and depth:
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                yield from _within(cell.cell_contents, depth - 1)
