"""Everything that a port shows in one run, by the keys under which a table would ask for it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.table import Table, counted, elements
from vit_ref.verify.compare.trace import Tap


class _Every(frozenset[str]):
    """The paths of a table that asks for all there are: it contains any, and lists none that a port could lack."""

    def __contains__(self, path: object) -> bool:
        return True

    def __and__(self, paths: Set[Any]) -> frozenset[str]:
        return frozenset(paths)


class Recorder(Table):
    """A table that changes nothing and keeps what passes, from whatever kind of port.

    Args:
      outline: of the model that the values are looked for in.
      inputs: what enters, of which the shapes matter.
    """

    def __init__(self, outline: Outline, inputs: Any):
        super().__init__({}, outline, inputs, lambda function, value: (value, function))
        self.paths = _Every()
        # In the order of the computation.
        self.values: dict[str, NDArray] = {}
        # What came more than once, as a shared module does: a table cannot tell one time from another.
        self.repeated: set[str] = set()

    def at_input(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap) -> tuple[Any, Any]:
        """See `Table.at_input`."""
        for k, (name, value) in enumerate([*((str(k), arg) for k, arg in enumerate(args)), *kwargs.items()]):
            self._keep(path, f":input[{name}]" if k else ":input", value)
        return args, kwargs

    def at_output(self, path: str, output: Any, tap: Tap) -> Any:
        """See `Table.at_output`."""
        for name, value in elements(output).items():
            self._keep(path, f"[{name}]", value)
        self._keep(path, "", output)
        return output

    def at_name(self, name: str, value: Any, tap: Tap) -> Any:
        """See `Table.at_name`."""
        self._keep(counted(name), "", value)
        return value

    def _keep(self, path: str, suffix: str, value: Any) -> None:
        # What is inside a transformation of the port's own has no value that could be read.
        if not path or not hasattr(value, "shape") or isinstance(value, jax.core.Tracer):
            return
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if path + suffix in self.values:
            self.repeated.add(path)
        if np.issubdtype(array.dtype, np.floating):
            self.values[path + suffix] = array
