"""A reference whose values and gradients in float64 are kept between runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from vit_ref.verify.cache.identity import digest, digest_arrays
from vit_ref.verify.cache.shelf import Shelf
from vit_ref.verify.compare.objectives import Gradients, Objective
from vit_ref.verify.compare.protocols import Reference
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.references.choice import with_fused_attention


class KeptReference:
    """A `Reference` that is built when something is asked of it that no earlier run has kept.

    To import transformers and to fill FlaxViT takes seconds. A second run on the same checkpoint needs neither.

    Args:
      shelf: the shelf of the reference with its weights.
      build: makes the reference.
    """

    def __init__(self, shelf: Shelf, build: Callable[[], Reference]):
        self._shelf, self._build = shelf, build
        self.fused = False
        # Whether the last trace in float64 is an earlier run's.
        self.recalled = False
        # Inputs whose trace `recall` returned, and that trace, until `trace` asks for it.
        self._ahead: tuple[Any, Trace] | None = None
        # The oracle may take the place of the reference that was asked for, so the name is known from a built one.
        known = shelf.find_fact("reference")
        if known is None:
            known = self.built.name, self.built.foreign
            shelf.keep_fact("reference", known)
        self.name: str = known[0]
        self.foreign: bool = known[1]

    @cached_property
    def built(self) -> Reference:
        """The reference itself."""
        return self._build()

    def recall(self, inputs: Any) -> Trace | None:
        """Returns the trace in float64 of an earlier run, or None. The next call of `trace` does not read it again."""
        found = self._shelf.for_inputs(inputs, FLOAT64).find_trace("forward")
        self._ahead = None if found is None else (inputs, found)
        return found

    def trace(self, inputs: Any, /, precision: Precision) -> Trace:
        """Implements `Reference.trace`."""
        if precision != FLOAT64:
            return self.built.trace(inputs, precision)
        shelf = self._shelf.for_inputs(inputs, precision)
        ahead, self._ahead = self._ahead, None
        trace = ahead[1] if ahead and ahead[0] is inputs else shelf.find_trace("forward")
        self.recalled = trace is not None
        if trace is None:
            trace = self.built.trace(inputs, precision)
            shelf.keep_trace("forward", trace)
        return trace

    def forget(self, inputs: Any) -> None:
        """Removes the trace in float64 from the cache, because the oracle does not agree with it."""
        self._shelf.for_inputs(inputs, FLOAT64).forget_trace("forward")

    def gradients(self, inputs: Any, /, precision: Precision) -> Callable[[Objective], Gradients]:
        """Implements `Reference.gradients`."""
        if precision != FLOAT64 or self.fused:
            built = with_fused_attention(self.built) if self.fused else self.built
            return built.gradients(inputs, precision)
        shelf = self._shelf.for_inputs(inputs, precision)
        prepare = cache(lambda: self.built.gradients(inputs, precision))
        if shelf.find_fact("gradients") is None:
            prepare()  # it is compiled while others run

        def gradients(objective: Objective) -> Gradients:
            what = f"gradients of {_digest_of(objective)}"
            found = shelf.find_trace(what)
            if found is not None:
                return _divided(found)
            computed = prepare()(objective)
            shelf.keep_trace(what, _joined(computed))
            shelf.keep_fact("gradients", True)
            return computed

        return gradients

    def storing(self, precision: Precision) -> KeptReference:
        """Implements `Reference.storing`."""
        shelf = self._shelf.within("stored", str(precision.stored))
        return KeptReference(shelf, lambda: self.built.storing(precision))


def unkept(reference: Reference) -> Reference:
    """Returns a reference that keeps nothing for later runs."""
    return reference.built if isinstance(reference, KeptReference) else reference


def has_values(shelf: Shelf, inputs: Any) -> bool:
    """Tells whether the cache has the reference's trace in float64, damaged or not.

    Args:
      shelf: the shelf of the reference with its weights.
      inputs: the inputs of the forward pass.
    """
    return shelf.for_inputs(inputs, FLOAT64).has_trace("forward")


def is_known(shelf: Shelf, inputs: Any, precision: Precision, differentiated: Any = None) -> bool:
    """Tells whether the cache has what a run needs of a reference, so that it need not be built.

    Args:
      shelf: the shelf of the reference with its weights.
      inputs: the inputs of the forward pass.
      precision: the tested precision.
      differentiated: the inputs of the backward pass; None without one.
    """
    if not has_values(shelf, inputs) or shelf.for_inputs(inputs, precision).find("reference") is None:
        return False
    return differentiated is None or shelf.for_inputs(differentiated, FLOAT64).find_fact("gradients") is not None


def _digest_of(objective: Objective) -> str:
    arrays = {"labels": objective.labels, "cotangent": objective.cotangent}
    arrays |= {f"fed {site}": value for site, value in objective.fed.items()}
    arrays |= {f"pulled {site}": value for site, value in objective.pulled.items()}
    return digest(objective.brightness, objective.loss_weight, digest_arrays(arrays))


def _joined(gradients: Gradients) -> Trace:
    """Returns all gradients under one name each: their kind and their own name."""
    kinds = gradients._asdict().items()
    return {f"{kind} {name}": value for kind, found in kinds for name, value in found.items()}


def _divided(trace: Trace) -> Gradients:
    """Returns what `_joined` was given."""
    found: dict[str, Trace] = {kind: {} for kind in Gradients._fields}
    for joined, value in trace.items():
        kind, _, name = joined.partition(" ")
        found[kind][name] = value
    return Gradients(**found)
