"""What the engine asks of those whom it compares, and of whoever explains what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from vit_ref.verify.compare.objectives import Gradients, Objective
from vit_ref.verify.compare.trace import Tap, Trace
from vit_ref.verify.precision import Precision
from vit_ref.verify.results import Cause, Explanation


class Reference(Protocol):
    """An implementation that decides, forward and backward. The oracle, which has to agree with it, is another.

    Attributes:
      name: how reports call it.
      foreign: whether it is no jax program, see `gates.ALLOWANCES`.
    """

    name: str
    foreign: bool

    def trace(self, inputs: Any, /, precision: Precision) -> Trace:
        """Runs one forward pass in evaluation mode.

        Args:
          inputs: see `Problem.inputs`.
          precision: of the whole computation; parameters and inputs are converted to its dtype, exactly or by rounding
            once. How it stores parameters is asked for by `storing`.

        Returns:
          Values by site. In float64 each one is float64; at lower precision an implementation may keep some wider, as
          FlaxViT keeps its residual stream in float32 under bfloat16.
        """
        ...

    def gradients(self, inputs: Any, /, precision: Precision) -> Callable[[Objective], Gradients]:
        """A function from an objective to its gradients, computed in `precision`.

        Parameters are stored in its dtype or in at least float32.

        Raises:
          UnsupportedByReferenceError: a reference has no backward pass.
          UndifferentiableError: a candidate has none.
        """
        ...

    def storing(self, precision: Precision) -> Reference:
        """The same with its parameters rounded as `precision` stores them."""
        ...


class Observable(Reference, Protocol):
    """A candidate, or a part of one. Its activations can be replaced, so that a block can be judged alone.

    Attributes:
      claims: the sites that it promises to show, None for all. A claimed site that it does not show has failed.
      fixed: those at which nothing can be replaced.
    """

    claims: frozenset[str] | None
    fixed: frozenset[str]

    def trace(self, inputs: Any, /, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """See `Reference.trace`; values in `replace` take the place of the candidate's own at those sites."""
        ...

    def storing(self, precision: Precision) -> Observable:
        """See `Reference.storing`."""
        ...


class Runnable(Observable, Protocol):
    """A whole candidate, which can also be run as its users run it.

    Attributes:
      compiles: whether it is one of jax. Any other can write into its inputs, which jax's arrays do not allow.
      notes: what a report says of how it was run, a line each; known once it has run.
    """

    compiles: bool
    notes: tuple[str, ...]

    def outputs(
        self, batches: Sequence[Any], precision: Precision, *, jit: bool = True, tap: Tap | None = None
    ) -> list[NDArray]:
        """Outputs of several batches of inputs, compiled where `jit` says so and the candidate compiles.

        A batch into which it writes has changed afterwards.

        Raises:
          jax.errors.JAXTypeError: it was to be compiled, and cannot be traced.
        """
        ...

    def path_of(self, site: str) -> str:
        """What in the candidate stands for a site: a submodule's path, or a name."""
        ...


class Explainer(Protocol):
    """Finds the known bugs that explain a divergence; it knows what is computed, which the engine does not."""

    def explain_formula(self, site: str, shown: Trace, truth: Trace) -> Explanation:
        """Explains the first divergence in float64.

        Args:
          site: where it is.
          shown: the candidate's trace in float64.
          truth: the reference's.
        """
        ...

    def explain_rounding(self, site: str, shown: Trace, truth: Trace, precision: Precision) -> tuple[Cause, ...]:
        """Explains rounding beyond the gate, where all formulas agree.

        Args:
          site: the first site beyond its gate.
          shown: the candidate's trace in the tested precision.
          truth: the reference's in float64.
          precision: the tested precision.
        """
        ...

    def explain_gradient(self, name: str, value: NDArray, truth: NDArray) -> Explanation:
        """Explains a gradient that is wrong in float64."""
        ...
