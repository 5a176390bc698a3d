"""The part that all declared candidates share: the declaration, the tables, and float64 without casts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vit_ref.errors import CandidateError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.casts import Casts
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.loading import claims
from vit_ref.verify.candidates.table import Table
from vit_ref.verify.compare.trace import Tap

Output = TypeVar("Output")


class Declared(ABC):
    """A candidate that was declared with a `Candidate`.

    Args:
      candidate: the declaration.
      config: the checkpoint's configuration.
      checkpoint: the path that the loader gets.
      loaded: what the loader returned for float64, if it was called already.

    Raises:
      CandidateError: its table does not fit the configuration.
    """

    def __init__(self, candidate: Candidate, config: ViTConfig, checkpoint: Path, loaded: Any = None):
        self.name = candidate.name
        self.config = config
        self.claims: frozenset[str] | None = claims(candidate, config)
        self.fixed: frozenset[str] = frozenset()
        self.notes: tuple[str, ...] = ()
        # Makes the table of sites from the images' shape. A proposal replaces it by one that asks for every value.
        self.tables: Callable[[tuple[int, ...]], Table] = lambda images: self._table(candidate.sites, images)
        self._candidate = candidate
        self._checkpoint = checkpoint
        # The model that was loaded last, with its dtype: reading a checkpoint takes seconds.
        self._loaded = None if loaded is None else (np.dtype(np.float64), loaded)

    def path_of(self, site: str) -> str:
        """See `Runnable.path_of`."""
        return self.tables((1, *self.config.image_hw)).path_of(site)

    @staticmethod
    @abstractmethod
    def _vjp(function: Callable[[Any], Any], value: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Returns a function's value, and the function that pulls a cotangent back."""

    @abstractmethod
    def _undoing(self, casts: Casts) -> AbstractContextManager[Any]:
        """Keeps the candidate from casting float64 to float32 within the context; `casts` counts the casts."""

    def _table(self, sites: Any, images: tuple[int, ...]) -> Table:
        return Table(sites, self.config, images, self._vjp)

    def _in_float64(self, forward: Callable[[Tap | None], Output], tap: Tap | None) -> Output:
        """Runs one forward pass in float64, without the candidate's casts to float32 if it can run without them."""
        casts = Casts()
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
