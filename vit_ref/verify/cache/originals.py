"""Notices that a candidate replaced functions that references compute with. What they compute then is not kept."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# The modules, with those below them, that references and oracle compute with.
_WATCHED = (
    "jax",
    "flax",
    "numpy",
    "scipy",
    "torch.nn",
    "transformers.activations",
    "transformers.integrations.sdpa_attention",
    "transformers.modeling_flax_utils",
    "transformers.modeling_utils",
    "transformers.models.vit",
)
# PyTorch's compiler replaces this function when it is imported. No reference draws random numbers.
_SEEDS = ("torch", "manual_seed")

# Functions and classes by module and name, and those of a class by module, class and name, as they were first seen.
_originals: dict[str, dict[str, Any]] = {}
# Those of these packages that were not imported when the rest was remembered, with the file that an import would find.
_PACKAGES = ("torch", "transformers")
_late: dict[str, str | None] = {}


def remember() -> None:
    """Remembers the functions and classes of each watched module once. Call it before a candidate is loaded.

    A second candidate in one process meets what the first one replaced. So a module is not read again. And a package
    that was imported since an earlier call is not read at all, unless `remember_after` imported it.
    """
    for package in _PACKAGES:
        if package not in sys.modules:
            _late[package] = _find_file(package)
    for name, module in list(sys.modules.items()):
        if name in _originals or name.partition(".")[0] in _late:
            continue
        if isinstance(module, ModuleType) and _is_watched(name):
            _originals[name] = _held(module)


def remember_after(load: Callable[[], None]) -> None:
    """Imports what a reference needs after a candidate was loaded, and remembers it if it is as it was installed.

    A candidate that replaced anything, or imported one of the packages itself, may have changed it. Then nothing is
    remembered, and `find_replaced` names a module of transformers.

    Args:
      load: imports the modules.
    """
    touched = find_replaced() or any(package in sys.modules for package in _late)
    load()
    if not touched and not _find_moved():
        for package in [package for package in _late if package in sys.modules]:
            del _late[package]
        remember()


def find_replaced(*, foreign: bool = True) -> str:
    """Returns the name of a function or class that is no longer the one remembered, or "" if all are.

    It also names a module of transformers that was imported later, a package that was imported from another place than
    before the candidate was loaded, and a setting of PyTorch that makes products less exact. It sees neither a function
    that is changed in place nor a method that is added to a class.

    Args:
      foreign: whether a candidate of others was loaded. Only such a one may have changed a module when it was imported.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_float32_matmul_precision() != "highest":
        return "torch.get_float32_matmul_precision"
    if foreign and (moved := _find_moved()):
        return moved
    for name in list(sys.modules) if foreign else ():
        if name not in _originals and name.startswith("transformers.") and _is_watched(name):
            return name
    for name, originals in _originals.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        now = _held(module)
        for attribute, original in originals.items():
            # An attribute may be gone, because jax removes names that it loads on demand.
            if attribute in now and now[attribute] is not original:
                return f"{name}.{attribute}"
    return ""


def _find_moved() -> str:
    """Returns the name of a package that was imported late and from another file than there was, or ""."""
    moved = (
        package
        for package, file in _late.items()
        if package in sys.modules and getattr(sys.modules[package], "__file__", None) != file
    )
    return next(moved, "")


def _find_file(package: str) -> str | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _is_watched(name: str) -> bool:
    # Most of PyTorch's modules compute nothing, and looking at all of them takes 0.2 s.
    return name == "torch" or any(f"{name}.".startswith(f"{each}.") for each in _WATCHED)


def _held(module: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in list(vars(module).items()):
        if isinstance(value, dict) and not name.startswith("__"):  # for example activations by name
            found |= {f"{name}[{key!r}]": each for key, each in list(value.items()) if callable(each)}
        if not callable(value) or (module.__name__, name) == _SEEDS:
            continue
        found[name] = value
        if isinstance(value, type) and value.__module__ == module.__name__:
            found |= {f"{name}.{part}": each for part, each in list(vars(value).items()) if callable(each)}
    return found
