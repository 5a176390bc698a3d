"""The part that all declared candidates share: the declaration, the tables, and float64 without casts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import CandidateError
from vit_ref.verify.candidates.casts import Casts
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.feeding import Feeding
from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.table import Table, claimed
from vit_ref.verify.compare.inputs import Inputs
from vit_ref.verify.compare.trace import Tap

Output = TypeVar("Output")


class Declared(ABC):
    """A candidate that was declared with a `Candidate`, or a reference that was declared with a `Reference`.

    Attributes:
      role: "candidate" or "reference", for the report.
      parts: the names of the outputs that were joined to one, in order; known after the first run.

    Args:
      candidate: the declaration.
      outline: the names and shapes of the model that it is compared with.
      checkpoint: the path that the loader gets; None for none.
      loaded: what the loader returned for float64, if it was called already.

    Raises:
      CandidateError: its table does not fit the outline.
    """

    role = "candidate"

    def __init__(self, candidate: Candidate, outline: Outline, checkpoint: Path | None, loaded: Any = None):
        self.name = candidate.name
        self.outline = outline
        known = outline.shapes(outline.example)
        self.claims: frozenset[str] | None = claimed(candidate.sites, outline, known) | {outline.output}
        self.fixed: frozenset[str] = frozenset()
        self.parts: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._single: frozenset[str] = frozenset()
        # Makes the table of sites from the inputs' shapes. A proposal replaces it by one that asks for every value.
        self.tables: Callable[[Any], Table] = lambda inputs: self._table(candidate.sites, inputs)
        self._candidate = candidate
        self._checkpoint = checkpoint
        # Models that were loaded, by dtype: reading a checkpoint takes seconds.
        self._loaded: dict[np.dtype, Any] = {} if loaded is None else {np.dtype(np.float64): loaded}

    @property
    def last(self) -> str:
        """Implements `Runnable.last`."""
        return self.outline.output

    def path_of(self, site: str) -> str:
        """Implements `Runnable.path_of`."""
        return self.tables(self.outline.example).path_of(site)

    @staticmethod
    @abstractmethod
    def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Returns a function's value, and the function that pulls a cotangent back."""

    @abstractmethod
    def _undoing(self, casts: Casts) -> AbstractContextManager[Any]:
        """Keeps the candidate from casting float64 to float32 within the context; `casts` counts the casts."""

    def find_single_uses(self, inputs: Inputs) -> None:
        """Finds the inputs of submodules in the table that nothing else uses. A change there reaches all that follows.

        Without this, such a site is neither replaced nor differentiated, because its value may go past the submodule.

        Args:
          inputs: see `Problem.inputs`.
        """
        table = self._table(self._candidate.sites, self.outline.example)
        entering = frozenset(
            entry.destination for point, entries in table.points.items() if point.of_input for entry in entries
        )
        if entering:
            self._single = entering  # so that a tap changes what enters the submodule
            self._single = self._used_once(inputs, entering)

    @abstractmethod
    def _used_once(self, inputs: Inputs, sites: frozenset[str]) -> frozenset[str]:
        """Returns those of the sites whose values nothing uses but what a tap returns."""

    def _table(self, sites: Any, inputs: Any) -> Table:
        return Table(sites, self.outline, inputs, self._vjp, self._single)

    def feed(self, inputs: Inputs) -> Any:
        """Returns what the candidate gets: the arguments made of named arrays, or images unchanged.

        Args:
          inputs: see `Problem.inputs`.
        """
        return self._feeding(inputs).arguments() if isinstance(inputs, Mapping) else inputs

    def by_input(self, inputs: Inputs, gradients: Any) -> dict[str, NDArray]:
        """Returns gradients by the names of the inputs.

        Args:
          inputs: see `Problem.inputs`.
          gradients: gradients with respect to what `feed` returned.
        """
        if isinstance(inputs, Mapping):
            return self._feeding(inputs).by_input(gradients)
        return {"pixels": gradients}

    def _feeding(self, inputs: Mapping[str, NDArray]) -> Feeding:
        return Feeding(inputs, self._candidate.adapt, self.name)

    def _in_float64(self, forward: Callable[[Tap | None], Output], tap: Tap | None) -> Output:
        """Runs one forward pass in float64, without its own casts to float32 if it can run without them."""
        casts = Casts(self.role)
        try:
            with self._undoing(casts):
                output = forward(casts.watching(tap) if tap else None)
        except CandidateError:
            # For example, a scan whose carry is float32 refuses float64.
            if not casts.number:
                raise
            return forward(tap)
        if tap:
            self.notes = casts.notes
        return output
