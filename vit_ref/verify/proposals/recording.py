"""Records every value that a candidate shows in one run, by the keys that a table would use."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.table import EveryPath, Table, counted, elements
from vit_ref.verify.compare.trace import Tap


class Recorder(Table):
    """A table that keeps every value and changes none, for candidates of any kind.

    Args:
      outline: the names and shapes of the model that the values are searched in.
      inputs: the inputs, whose values do not matter, only their shapes.
    """

    def __init__(self, outline: Outline, inputs: Any):
        super().__init__({}, outline, inputs, lambda function, value: (value, function))
        self.paths = EveryPath()
        # In the order of the computation.
        self.values: dict[str, NDArray] = {}
        # Paths that were met more than once, such as a shared module's: a table cannot tell one time from another.
        self.repeated: set[str] = set()

    def at_input(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap) -> tuple[Any, Any]:
        """Implements `Table.at_input`."""
        for k, (name, value) in enumerate([*((str(k), arg) for k, arg in enumerate(args)), *kwargs.items()]):
            self._keep(path, f":input[{name}]" if k else ":input", value)
        return args, kwargs

    def at_output(self, path: str, output: Any, tap: Tap) -> Any:
        """Implements `Table.at_output`."""
        for name, value in elements(output).items():
            self._keep(path, f"[{name}]", value)
        self._keep(path, "", output)
        return output

    def at_name(self, name: str, value: Any, tap: Tap) -> Any:
        """Implements `Table.at_name`."""
        self._keep(counted(name), "", value)
        return value

    def _keep(self, path: str, suffix: str, value: Any) -> None:
        # A value inside the candidate's own transformation cannot be read.
        if not path or not hasattr(value, "shape") or isinstance(value, jax.core.Tracer):
            return
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if path + suffix in self.values:
            self.repeated.add(path)
        if np.issubdtype(array.dtype, np.floating):
            self.values[path + suffix] = array
