"""Base of the implementations in JAX that pass their values through a tap, which records, replaces or perturbs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError, UndifferentiableError
from vit_ref.verify.candidates.adapters import is_float
from vit_ref.verify.candidates.outline import Shape
from vit_ref.verify.compare.inputs import Inputs
from vit_ref.verify.compare.objectives import Gradients, Objective, differentiator
from vit_ref.verify.compare.trace import Forward, Tap, Trace, beside, recorder, replacements
from vit_ref.verify.precision import Precision


class _Compiled(NamedTuple):
    """The compiled functions of the forward pass in one dtype, which work for any parameters.

    Attributes:
      recorder: see `trace.recorder`; it is compiled when it is called.
      differentiators: see `objectives.differentiator`.
      perturbed: the sites that were met when the differentiators were traced.
    """

    recorder: Callable[..., dict[str, jax.Array]]
    differentiators: dict[Any, Future[Any]]
    perturbed: set[str]


class Tapped(ABC):
    """An implementation in JAX that can be observed and changed at its sites.

    Attributes:
      name: its name in reports.
      claims: the sites that it promises to show; None for all. A claimed site that is not shown fails. Other sites are
        not observed.
      fixed: the shown sites whose values can be neither replaced nor perturbed; known after the first run.
      stored: the dtype that its parameters are rounded to; None leaves them as they were loaded.
      foreign: whether it runs outside jax. This is always False here.
      compiles: whether it can be compiled. A candidate that cannot may write into its inputs instead.
      notes: notes for the report on how it was run, one line each; known after the first run.
    """

    name: str
    claims: frozenset[str] | None = None
    fixed: frozenset[str] = frozenset()
    stored: DTypeLike | None = None
    foreign = False
    compiles = True
    notes: tuple[str, ...] = ()

    @abstractmethod
    def ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        """Returns the parameters, and the forward pass that computes with them in `dtype`.

        Args:
          dtype: the dtype of the computation. Its precision is active during the call.
        """

    @abstractmethod
    def by_path(self, gradients: Any) -> dict[str, NDArray]:
        """Returns gradients of the parameters, on the host, by the names of the model that it is compared with.

        Args:
          gradients: a tree like the parameters.
        """

    @property
    @abstractmethod
    def last(self) -> str:
        """See `Runnable`."""

    @abstractmethod
    def shapes(self, inputs: Inputs) -> Mapping[str, Shape]:
        """Returns the shape of the value at every site that can be shown, in order.

        Args:
          inputs: the inputs.
        """

    def feed(self, inputs: Inputs) -> Any:
        """Returns what the forward pass gets for these inputs: a tree of arrays.

        Args:
          inputs: the inputs.
        """
        return inputs

    def by_input(self, inputs: Inputs, gradients: Any) -> dict[str, NDArray]:
        """Returns gradients by the names of the inputs.

        Args:
          inputs: the inputs.
          gradients: a tree like that of `feed`.
        """
        return {"pixels": gradients}

    def _ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        parameters, forward = self.ready(dtype)
        if self.stored is None:
            return parameters, forward
        wide = np.dtype(dtype) == np.float64

        def rounded(leaf: Any) -> Any:
            return leaf.astype(self.stored).astype(dtype) if wide else leaf.astype(self.stored)

        return jax.tree.map(lambda leaf: rounded(leaf) if is_float(leaf) else leaf, parameters), forward

    def storing(self, precision: Precision) -> Self:
        """Implements `Reference.storing`."""
        narrow = copy(self)
        narrow.stored = precision.stored
        return narrow

    def path_of(self, site: str) -> str:
        """Implements `Runnable.path_of`."""
        return site

    def trace(self, inputs: Inputs, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """Implements `Observable.trace`.

        Args:
          inputs: float32 images (B, height, width, C), or arrays by name.
          precision: the precision to compute in.
          replace: values by site that replace the model's own, after those were recorded.

        Raises:
          InputError: a value cannot be observed from outside.
        """
        with precision.active():
            parameters, forward = self._ready(precision.dtype)

            given = replacements(replace, precision.dtype)
            fed = as_arrays(self.feed(inputs), precision.dtype)
            try:
                return jax.device_get(self._compiled_of(forward, precision.dtype).recorder(parameters, fed, given))
            except jax.errors.JAXTypeError:
                pass
            try:
                # It leaves jax for Python or NumPy. Its values can still be compared; `check_behaviour` reports it.
                shown = recorder(forward)(parameters, fed, given)
            except jax.errors.JAXTypeError as error:
                raise CandidateError.raised(self.name, "the forward pass", error) from error
            inside = [site for site, value in shown.items() if isinstance(value, jax.core.Tracer)]
            if inside:
                raise InputError(
                    f"{self.name}: {inside[0]} is computed inside the candidate's own jit, vmap or scan, and cannot be"
                    " observed there: return it with the logits, or call the function without the transformation"
                )
            return {site: np.asarray(value) for site, value in shown.items()}

    def outputs(
        self, batches: Sequence[Inputs], precision: Precision, *, jit: bool = True, tap: Tap | None = None
    ) -> list[NDArray]:
        """Returns the outputs of several batches of inputs, compiled or operation by operation.

        Args:
          batches: float32 images (B, height, width, C), or arrays by name.
          precision: the precision to compute in.
          jit: whether to compile.
          tap: called with every site and its value; None runs without a tap.

        Raises:
          jax.errors.JAXTypeError: jax cannot trace it, so it cannot be compiled.
        """
        with precision.active():
            parameters, forward = self._ready(precision.dtype)

            def run(parameters: Any, fed: Any) -> jax.Array:
                return forward(parameters, fed, tap)

            several = [as_arrays(self.feed(inputs), precision.dtype) for inputs in batches]
            if not jit:
                return [np.asarray(run(parameters, fed)) for fed in several]
            sizes = {_size(fed): fed for fed in several}
            compiling = {size: beside(jax.jit(run).lower(parameters, fed).compile) for size, fed in sizes.items()}
            return [np.asarray(compiling[_size(fed)].result()(parameters, fed)) for fed in several]

    def gradients(
        self, inputs: Inputs, precision: Precision, *, like: Objective | None = None
    ) -> Callable[[Objective], Gradients]:
        """Implements `Reference.gradients`, and `differentiator` for `like`."""
        with precision.active():
            parameters, forward = self._ready(precision.dtype)
        _, compiled, perturbed = self._compiled_of(forward, precision.dtype)

        def keeping(parameters: Any, fed: Any, tap: Tap) -> jax.Array:
            # It is computed and not a constant, so that no compiler can remove a division by it.
            some = jax.tree.leaves(fed)[0]
            some = jax.lax.stop_gradient(some[(0,) * some.ndim])
            one = 1 + 0 * (some if is_float(some) else some.astype(np.float32))

            def kept(site: str, value: jax.Array) -> jax.Array:
                tapped = tap(site, value)
                if tapped is value:  # it has a wrong shape, and was not perturbed
                    return value
                perturbed.add(site)
                return _kept_backward(tapped, one)

            return forward(parameters, fed, kept)

        try:
            differentiate = differentiator(
                keeping,
                parameters,
                self.shapes(inputs),
                self.feed(inputs),
                precision,
                like=like,
                compiled=compiled,
            )
        except CandidateError as error:
            # The forward pass ran, so the candidate calls something that jax cannot differentiate, such as a callback.
            raise UndifferentiableError(f"jax cannot differentiate it: {error}") from error
        except jax.errors.JAXTypeError as error:
            reason = f"jax cannot trace it ({type(error).__name__}), so it cannot be differentiated"
            raise UndifferentiableError(reason) from error

        def gradients(objective: Objective) -> Gradients:
            by_parameter, by_site, by_fed = differentiate(objective)
            # A site that was never met has a gradient of zeros, which says nothing about the candidate.
            met = {site: gradient for site, gradient in by_site.items() if site in perturbed - self.fixed}
            return Gradients(met, self.by_path(by_parameter), self.by_input(inputs, by_fed))

        return gradients

    @cached_property
    def _compiled(self) -> dict[np.dtype, _Compiled]:
        return {}

    def _compiled_of(self, forward: Forward, dtype: np.dtype) -> _Compiled:
        """Returns the functions that were compiled for this dtype, or new ones, which trace this forward pass."""
        if dtype not in self._compiled:
            self._compiled[dtype] = _Compiled(jax.jit(recorder(forward)), {}, set())
        return self._compiled[dtype]


def as_arrays(fed: Any, dtype: DTypeLike) -> Any:
    """Returns a tree of arrays for jax, with floats in the dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if is_float(leaf) else None), fed)


def _size(fed: Any) -> Any:
    return jax.tree.structure(fed), tuple(leaf.shape for leaf in jax.tree.leaves(fed))


@jax.custom_vjp
def _kept_backward(x: jax.Array, one: jax.Array) -> jax.Array:
    """Returns x, and divides its cotangent by one, so that XLA computes the cotangent once and keeps it.

    Without the division, XLA on CPU fuses the sum that is the stream's cotangent into each of its readers again. The
    backward pass of twelve blocks then takes several times as long to compile. A barrier does not help: XLA skips it.
    """
    return x


def _kept_backward_forward(x: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, one


def _kept_backward_backward(one: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent / one.astype(cotangent.dtype), jnp.zeros_like(one)


_kept_backward.defvjp(_kept_backward_forward, _kept_backward_backward)
