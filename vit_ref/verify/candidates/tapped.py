"""Whatever runs in JAX and passes its values through a tap: recorded, replaced, perturbed and differentiated alike."""

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
    """What was compiled of one forward pass, for whichever parameters.

    Attributes:
      recorder: see `trace.recorder`, compiled when it is called.
      differentiators: see `objectives.differentiator`.
      perturbed: the sites that were met when those were traced.
    """

    recorder: Callable[..., dict[str, jax.Array]]
    differentiators: dict[Any, Future[Any]]
    perturbed: set[str]


class Tapped(ABC):
    """An implementation in JAX that can be observed and changed at its sites.

    Attributes:
      name: how reports call it.
      claims: the sites that it promises to show, None for all. Others are not observed; a claimed one that is not shown
        has failed.
      fixed: the sites among those shown at which it can be neither replaced nor perturbed; known once it has run.
      stored: the dtype that its parameters are rounded to, None for as they were loaded.
      foreign: whether it is no jax program; what is in jax never is.
      compiles: whether it can be compiled; what cannot can write into its inputs instead.
      notes: what a report says of how it was run, a line each; known once it has run.
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
        """Parameters, and the forward pass in `dtype` from them; called where that precision is active."""

    @abstractmethod
    def by_path(self, gradients: Any) -> dict[str, NDArray]:
        """Gradients with respect to the parameters, on the host, by the names of the model that decides."""

    @abstractmethod
    def shapes(self, inputs: Inputs) -> Mapping[str, Shape]:
        """Every site that can be shown, with the shape of its value, in order."""

    def feed(self, inputs: Inputs) -> Any:
        """What the forward pass is given for these inputs: a tree of arrays."""
        return inputs

    def by_input(self, inputs: Inputs, gradients: Any) -> dict[str, NDArray]:
        """Gradients with respect to what was fed, by the names of the inputs."""
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
        """See `Reference.storing`."""
        narrow = copy(self)
        narrow.stored = precision.stored
        return narrow

    def path_of(self, site: str) -> str:
        """See `Runnable.path_of`."""
        return site

    def trace(self, inputs: Inputs, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """See `Observable.trace`.

        Args:
          inputs: as there.
          precision: as there.
          replace: values by site that take the place of the model's own, after those were recorded.

        Raises:
          InputError: a value is out of reach.
        """
        with precision.active():
            parameters, forward = self._ready(precision.dtype)

            given = replacements(replace, precision.dtype)
            fed = _cast(self.feed(inputs), precision.dtype)
            try:
                return jax.device_get(self._compiled_of(forward).recorder(parameters, fed, given))
            except jax.errors.JAXTypeError:
                pass
            try:
                # It leaves jax for Python or NumPy. Its values can still be judged; `check_behaviour` says the rest.
                shown = recorder(forward)(parameters, fed, given)
            except jax.errors.JAXTypeError as error:
                raise CandidateError.raised(self.name, "the forward pass", error) from error
            inside = [site for site, value in shown.items() if isinstance(value, jax.core.Tracer)]
            if inside:
                raise InputError(
                    f"{self.name}: {inside[0]} is computed under a transformation of its own (jit, vmap, scan), where"
                    " nothing can be seen from outside: return it with the logits, or call what is transformed"
                )
            return {site: np.asarray(value) for site, value in shown.items()}

    def outputs(
        self, batches: Sequence[Inputs], precision: Precision, *, jit: bool = True, tap: Tap | None = None
    ) -> list[NDArray]:
        """The outputs alone of several batches of inputs, compiled or operation by operation; by default without a tap.

        Raises:
          jax.errors.JAXTypeError: it was to be compiled, and cannot be traced.
        """
        with precision.active():
            parameters, forward = self._ready(precision.dtype)

            def run(parameters: Any, fed: Any) -> jax.Array:
                return forward(parameters, fed, tap)

            several = [_cast(self.feed(inputs), precision.dtype) for inputs in batches]
            if not jit:
                return [np.asarray(run(parameters, fed)) for fed in several]
            sizes = {_size(fed): fed for fed in several}
            compiling = {size: beside(jax.jit(run).lower(parameters, fed).compile) for size, fed in sizes.items()}
            return [np.asarray(compiling[_size(fed)].result()(parameters, fed)) for fed in several]

    def gradients(
        self, inputs: Inputs, precision: Precision, *, like: Objective | None = None
    ) -> Callable[[Objective], Gradients]:
        """See `Reference.gradients`, and `differentiator` for `like`."""
        with precision.active():
            parameters, forward = self._ready(precision.dtype)
        _, compiled, perturbed = self._compiled_of(forward)

        def keeping(parameters: Any, fed: Any, tap: Tap) -> jax.Array:
            # No constant, so that no compiler can take a division by it for nothing.
            some = jax.tree.leaves(fed)[0]
            some = jax.lax.stop_gradient(some[(0,) * some.ndim])
            one = 1 + 0 * (some if is_float(some) else some.astype(np.float32))

            def kept(site: str, value: jax.Array) -> jax.Array:
                tapped = tap(site, value)
                if tapped is value:  # it has another shape, and was not perturbed
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
            # It ran forward: it calls what jax has no derivative of, such as a callback.
            raise UndifferentiableError(f"jax cannot differentiate it: {error}") from error
        except jax.errors.JAXTypeError as error:
            reason = f"jax cannot trace it ({type(error).__name__}), so it cannot be differentiated"
            raise UndifferentiableError(reason) from error

        def gradients(objective: Objective) -> Gradients:
            by_parameter, by_site, by_fed = differentiate(objective)
            # A site that was never met has a gradient of zeros, which says nothing about the port.
            met = {site: gradient for site, gradient in by_site.items() if site in perturbed - self.fixed}
            return Gradients(met, self.by_path(by_parameter), self.by_input(inputs, by_fed))

        return gradients

    @cached_property
    def _compiled(self) -> dict[Forward, _Compiled]:
        return {}

    def _compiled_of(self, forward: Forward) -> _Compiled:
        if forward not in self._compiled:
            self._compiled[forward] = _Compiled(jax.jit(recorder(forward)), {}, set())
        return self._compiled[forward]


def _cast(fed: Any, dtype: DTypeLike) -> Any:
    """A tree of arrays for jax, floats in the dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if is_float(leaf) else None), fed)


def _size(fed: Any) -> Any:
    return jax.tree.structure(fed), tuple(leaf.shape for leaf in jax.tree.leaves(fed))


@jax.custom_vjp
def _kept_backward(x: jax.Array, one: jax.Array) -> jax.Array:
    """x itself, whose cotangent XLA computes once and keeps, because it divides it, by one.

    Where all is cheap, on CPU, it fuses the sum that is the stream's cotangent, a term a branch, into each of its
    readers anew: the backward pass of twelve blocks then takes 19 s to compile in place of 4. It skips barriers.
    """
    return x


def _kept_backward_forward(x: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, one


def _kept_backward_backward(one: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent / one.astype(cotangent.dtype), jnp.zeros_like(one)


_kept_backward.defvjp(_kept_backward_forward, _kept_backward_backward)
