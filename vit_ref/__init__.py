"""A Vision Transformer in Flax NNX, and the suite that proves weight ports numerically right."""

from typing import Any

import lazy_loader

# A public name stands in `__init__.pyi` alone. It is imported when it is first used: the command and pytest's plugin
# start without waiting for jax.
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vit-ref")
    return _find(name)
