"""Runs a declared candidate that is written in JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError
from vit_ref.verify.candidates.adapters import adapted, is_float
from vit_ref.verify.candidates.casts import Casts
from vit_ref.verify.candidates.declared import Declared
from vit_ref.verify.candidates.feeding import Arguments
from vit_ref.verify.candidates.loading import in_one_line, load, observed, recognised
from vit_ref.verify.candidates.outline import Shape
from vit_ref.verify.candidates.table import counted
from vit_ref.verify.candidates.tapped import Tapped, as_arrays
from vit_ref.verify.candidates.uses import find_used_once, mark
from vit_ref.verify.compare.inputs import Inputs
from vit_ref.verify.compare.trace import Forward, Tap
from vit_ref.verify.precision import FLOAT64
from vit_ref.weights.pretrained import get_state_parameters


class JaxCandidate(Declared, Tapped):
    """A declared candidate of any kind except PyTorch's."""

    def ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        """Implements `Tapped.ready`."""
        candidate = self._candidate
        if np.dtype(dtype) not in self._loaded:
            self._loaded[np.dtype(dtype)] = load(candidate, self._checkpoint, dtype)
        with in_one_line(self.name, "taking its parameters"):
            parameters, run = adapted(self._loaded[np.dtype(dtype)], candidate.call, self.name, dtype)
            _require_values(parameters, self.name)
            if np.dtype(dtype) == np.float64:
                parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if is_float(x) else x, parameters)

        def forward(parameters: Any, fed: Any, tap: Tap | None) -> jax.Array:
            table = self.tables(fed) if tap else self._table({}, fed)
            arguments = fed if isinstance(fed, Arguments) else self._images(fed)

            def passed(tap: Tap | None) -> jax.Array:
                return observed(candidate, self.outline, partial(run, parameters, arguments), table, tap)

            output = self._in_float64(passed, tap) if np.dtype(dtype) == np.float64 else passed(tap)
            if tap:
                self.fixed, self.parts = frozenset(table.fixed), table.parts
            return output

        return parameters, forward

    def shapes(self, inputs: Inputs) -> Mapping[str, Shape]:
        """Implements `Tapped.shapes`."""
        return self.outline.shapes(inputs)

    def _used_once(self, inputs: Inputs, sites: frozenset[str]) -> frozenset[str]:
        with FLOAT64.active():
            parameters, forward = self.ready(np.float64)

            def marked(parameters: Any, fed: Any) -> jax.Array:
                return forward(parameters, fed, lambda site, value: mark(value, site) if site in sites else value)

            try:
                traced = jax.make_jaxpr(marked)(parameters, as_arrays(self.feed(inputs), np.float64))
            except (jax.errors.JAXTypeError, CandidateError):  # it leaves jax, so a trace does not show all of it
                return frozenset()
        return sites & find_used_once(traced)

    def _images(self, images: jax.Array) -> Arguments:
        return Arguments((images.transpose(0, 3, 1, 2) if self._candidate.channels_first else images,), {})

    @staticmethod
    def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
        picked, pull_back = jax.vjp(function, value)
        return picked, lambda cotangent: pull_back(cotangent)[0]

    def _undoing(self, casts: Casts) -> contextlib.AbstractContextManager[None]:
        return without_casts(np.float64, casts)

    def by_path(self, gradients: Any) -> dict[str, NDArray]:
        """Implements `Tapped.by_path`."""
        return recognised(self._candidate, self.outline, _leaves(gradients))

    def parameters(self) -> dict[str, NDArray]:
        """Returns the candidate's parameters in float64, on the host, by its own paths."""
        with FLOAT64.active(), in_one_line(self.name, "reading its parameters"):
            return {counted(name): value for name, value in _leaves(self.ready(np.float64)[0]).items()}


def _require_values(parameters: Any, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise CandidateError(
                f"{name}: {where!r} has a shape but no values, as after `eval_shape`: fill it from the checkpoint"
            )


def _leaves(tree: Any) -> dict[str, NDArray]:
    if isinstance(tree, nnx.State):
        return get_state_parameters(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@contextlib.contextmanager
def without_casts(dtype: DTypeLike, casts: Casts) -> Iterator[None]:
    """Keeps jax from casting float64 to float32 within the context; see the module `casts`.

    It replaces primitives, because candidates may import a function such as `jax.nn.dot_product_attention` under any
    name. Code that is traced inside a transformation uses the primitives, too.

    Args:
      dtype: the dtype of the computation. Below float64 nothing is replaced.
      casts: counts the casts that were undone.
    """
    if np.dtype(dtype) != np.float64:
        yield
        return
    cast, product = lax.convert_element_type_p.bind, lax.dot_general_p.bind
    attention: Any = jax.nn.dot_product_attention.__globals__
    fused, cudnn = attention.get(_FUSED), attention.get(_CUDNN)

    def converted(x: Any, *, new_dtype: Any, **how: Any) -> Any:
        if new_dtype != np.float32 or getattr(x, "dtype", None) != np.float64:
            return cast(x, new_dtype=new_dtype, **how)
        casts.number += 1
        return x

    def multiplied(x: Any, y: Any, *, preferred_element_type: Any, **how: Any) -> Any:
        if preferred_element_type == np.float32 and x.dtype == np.float64:
            casts.number += 1
            preferred_element_type = x.dtype
        return product(x, y, preferred_element_type=preferred_element_type, **how)

    def on_gpu(
        query: Any, key: Any, value: Any, bias: Any, mask: Any, *lengths: Any, mask_type: Any, **options: Any
    ) -> Any:
        scale = options.pop("scale")
        if mask_type.name != "NO_MASK" or any(
            option is not None and option is not False for option in options.values()
        ):
            return cudnn(query, key, value, bias, mask, *lengths, mask_type=mask_type, scale=scale, **options)
        return fused(query, key, value, bias, mask, False, scale, None, None, None)

    def mixing(bind: Callable[..., Any]) -> Callable[..., Any]:
        """Returns an operation that accepts a float32 constant beside a float64 value."""

        def operated(x: Any, y: Any, **how: Any) -> Any:
            if {x.dtype, y.dtype} == _MIXED:
                x, y = (jnp.asarray(each, np.float64) for each in (x, y))
            return bind(x, y, **how)

        return operated

    replaced = {lax.convert_element_type_p: converted, lax.dot_general_p: multiplied}
    replaced |= {operation: mixing(operation.bind) for operation in _OPERATIONS}
    with contextlib.ExitStack() as stack:
        # These are the same products as with "highest". But jax caches traces by this setting, so a trace from outside
        # the context is not used within it, nor the other way round.
        stack.enter_context(jax.default_matmul_precision("float32"))
        for operation, bind in replaced.items():
            stack.enter_context(mock.patch.object(operation, "bind", bind))
        # cuDNN's attention does not support float64.
        stack.enter_context(mock.patch.dict(attention, {_CUDNN: on_gpu} if fused and cudnn else {}))
        yield


_OPERATIONS = (lax.add_p, lax.sub_p, lax.mul_p, lax.div_p, lax.max_p, lax.min_p, lax.pow_p)
_MIXED = {np.dtype(np.float32), np.dtype(np.float64)}
# These names are not public; a test checks that jax still has them.
_FUSED = "_dot_product_attention_xla"
_CUDNN = "cudnn_dot_product_attention"
