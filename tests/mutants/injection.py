"""Puts bugs into the candidate under test, and into nothing else.

FlaxViT and the NumPy oracle use jax, flax and numpy, too. So a library is never patched; only the view that one module
of this package has of it.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from vit_ref.model import vit
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import stream_before
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.candidates.own import OwnCandidate

Inject = Callable[[pytest.MonkeyPatch], None]


class _Instead:
    """A module with one of its names replaced."""

    def __init__(self, module: Any, name: str, value: Any):
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def instead(monkeypatch: pytest.MonkeyPatch, importer: ModuleType, dotted: str, value: Any) -> None:
    """Makes `importer` alone see `value` under the name `dotted`, such as "jax.nn.softmax"."""
    head, *path = dotted.split(".")
    outer = [getattr(importer, head)]
    for name in path[:-1]:
        outer.append(getattr(outer[-1], name))
    for name, module in zip(reversed(path), reversed(outer), strict=True):
        value = _Instead(module, name, value)
    monkeypatch.setattr(importer, head, value)


class Pass(NamedTuple):
    """The forward pass up to a site: `here["norm1"]` is an earlier value of the same block."""

    model: VisionTransformer
    site: str
    values: dict[str, Array]
    rngs: nnx.Rngs | None

    def __getitem__(self, site: Any) -> Any:
        block = ".".join(self.site.split(".")[:2]) + "." if self.site.startswith("block.") else ""
        return self.values[block + site]

    @property
    def block(self) -> vit.Block:
        """The site's block."""
        return self.model.blocks[int(self.site.split(".")[1])]

    @property
    def stream(self) -> Array:
        """The token stream that enters the site's block."""
        before = stream_before(self.site, self.model.config.num_hidden_layers)
        assert before is not None
        return self.values[before]


def at(pattern: str, change: Callable[[Array, Pass], Array]) -> Inject:
    """Makes the model compute `change(value, here)` at all sites like `pattern`. Later values depend on it."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        call = VisionTransformer.__call__

        def changed(self: VisionTransformer, pixels: Array, *, tap: vit.Tap = vit.identity, **options: Any) -> Any:
            values: dict[str, Array] = {}

            def through(site: str, value: Array) -> Array:
                if fnmatchcase(site, pattern):
                    here = Pass(self, site, values, options.get("rngs"))
                    value = change(value, here).astype(value.dtype)
                values[site] = tap(site, value)
                return values[site]

            return call(self, pixels, tap=through, **options)

        monkeypatch.setattr(VisionTransformer, "__call__", changed)

    return inject


def loaded(change: Callable[[dict[str, NDArray], ViTConfig], dict[str, NDArray]]) -> Inject:
    """Makes the candidate fill its model with `change(parameters by path, config)`.

    `change` returns the parameters to replace. It must not write into arrays, because some are the checkpoint's own.
    """

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        init = OwnCandidate.__init__

        def changed(self: OwnCandidate, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.parameters = {**self.parameters, **change(self.parameters, self.config)}

        monkeypatch.setattr(OwnCandidate, "__init__", changed)

    return inject


def fed(change: Callable[[Array], Array]) -> Inject:
    """Makes the model use `change(pixels)` as its images."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        call = VisionTransformer.__call__
        monkeypatch.setattr(
            VisionTransformer, "__call__", lambda self, pixels, **options: call(self, change(pixels), **options)
        )

    return inject


def layers(name: str, make: Callable[..., Any]) -> Inject:
    """Builds the model with `make` instead of flax's layer `name`."""
    return lambda monkeypatch: instead(monkeypatch, vit, f"nnx.{name}", make)


def both(*injects: Inject) -> Inject:
    """Combines several changes that make one bug."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        for each in injects:
            each(monkeypatch)

    return inject
