"""The interfaces that the engine needs: of implementations that it compares, and of the explainer of divergences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from vit_ref.verify.compare.objectives import Gradients, Objective
from vit_ref.verify.compare.trace import Tap, Trace
from vit_ref.verify.gates import Errors
from vit_ref.verify.precision import Precision
from vit_ref.verify.results import Cause, Explanation


class Reference(Protocol):
    """An implementation that decides, forward and backward. The oracle has this interface too.

    Attributes:
      name: its name in reports.
      foreign: whether it runs outside jax, see `gates.ALLOWANCES`.
    """

    name: str
    foreign: bool

    def trace(self, inputs: Any, /, precision: Precision) -> Trace:
        """Runs one forward pass in evaluation mode.

        Args:
          inputs: see `Problem.inputs`.
          precision: the precision of the whole computation. Parameters and inputs are converted to its dtype, exactly
            or by rounding once. `storing` rounds stored parameters.

        Returns:
          Values by site. In float64 each value is float64. In a lower precision some may be wider: FlaxViT keeps its
          residual stream in float32 under bfloat16.
        """
        ...

    def gradients(self, inputs: Any, /, precision: Precision) -> Callable[[Objective], Gradients]:
        """Returns a function from an objective to its gradients.

        Args:
          inputs: see `Problem.inputs`.
          precision: the precision of the computation. Parameters have its dtype, or at least float32.

        Raises:
          UnsupportedByReferenceError: the reference has no backward pass.
          UndifferentiableError: the candidate has no backward pass.
        """
        ...

    def storing(self, precision: Precision) -> Reference:
        """Returns the same implementation with its parameters rounded as `precision` stores them."""
        ...


class Kept(Protocol):
    """Errors of one reference that an earlier run has measured, on the same inputs and in the same precision."""

    def find(self, what: str) -> Errors | None:
        """Returns the errors under a name, or None if no run has kept them."""
        ...

    def keep(self, what: str, errors: Errors) -> None:
        """Keeps errors under a name for later runs."""
        ...


class Nothing:
    """A `Kept` that has nothing and keeps nothing."""

    def find(self, what: str) -> Errors | None:
        """Implements `Kept.find`."""
        return None

    def keep(self, what: str, errors: Errors) -> None:
        """Implements `Kept.keep`."""


class Observable(Reference, Protocol):
    """A candidate, or a part of one. Its values can be replaced, so that a block can be tested alone.

    Attributes:
      claims: the sites that it promises to show; None for all. A claimed site that it does not show fails.
      fixed: the sites whose values cannot be replaced.
    """

    claims: frozenset[str] | None
    fixed: frozenset[str]

    def trace(self, inputs: Any, /, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """Implements `Reference.trace`. Values in `replace` take the place of the candidate's own at those sites."""
        ...

    def storing(self, precision: Precision) -> Observable:
        """Implements `Reference.storing`."""
        ...


class Runnable(Observable, Protocol):
    """A whole candidate, which can also be run as its users run it.

    Attributes:
      compiles: whether jax can compile it. Any other candidate may write into its inputs.
      notes: notes for the report on how it was run, one line each; known after the first run.
    """

    compiles: bool
    notes: tuple[str, ...]

    @property
    def last(self) -> str:
        """The site of its output."""
        ...

    def outputs(
        self, batches: Sequence[Any], precision: Precision, *, jit: bool = True, tap: Tap | None = None
    ) -> list[NDArray]:
        """Returns the outputs of several batches of inputs. If the candidate writes into a batch, the batch changes.

        Args:
          batches: see `Problem.inputs`.
          precision: the precision of the computation.
          jit: whether to compile the candidate, if it compiles.
          tap: called with every site and its value; None runs without a tap.

        Raises:
          jax.errors.JAXTypeError: jax cannot trace it, so it cannot be compiled.
        """
        ...

    def path_of(self, site: str) -> str:
        """Returns the part of the candidate that stands for a site: a submodule's path, or a name."""
        ...


class Explainer(Protocol):
    """A search for causes of a divergence. It knows the model that is computed, and the engine does not."""

    def explain_formula(self, site: str, shown: Trace, truth: Trace) -> Explanation:
        """Explains the first divergence in float64.

        Args:
          site: the site of the divergence.
          shown: the candidate's trace in float64.
          truth: the reference's trace in float64.
        """
        ...

    def explain_rounding(self, site: str, shown: Trace, truth: Trace, precision: Precision) -> tuple[Cause, ...]:
        """Explains rounding beyond the gate if all formulas agree.

        Args:
          site: the first site beyond its gate.
          shown: the candidate's trace in the tested precision.
          truth: the reference's trace in float64.
          precision: the tested precision.
        """
        ...

    def explain_gradient(self, name: str, value: NDArray, truth: NDArray) -> Explanation:
        """Explains a gradient that is wrong in float64."""
        ...
