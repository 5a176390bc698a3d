"""Records every value that a model shows in one run, by the keys that a table would use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.candidates.outline import Outline
from vit_ref.verify.candidates.table import EveryPath, Table, counted, elements, with_element
from vit_ref.verify.compare.inputs import is_float
from vit_ref.verify.compare.trace import Tap


def copy_to_host(value: Any) -> Any:
    """Returns the value of a tensor or of an array of jax as a NumPy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


class Recorder(Table):
    """A table that keeps every array of floats, for models of any kind. It changes only the values that it is given.

    Args:
      outline: the names and shapes of the model that the values are searched in.
      inputs: the inputs, whose values do not matter, only their shapes.
      keep: returns what to keep of a value.
      fed: values that take the place of the model's own, by key.

    Attributes:
      values: what was kept, by key, in the order of the pass.
      repeated: paths that were met more than once, such as a shared module's. A table cannot tell the times apart.
    """

    def __init__(
        self,
        outline: Outline,
        inputs: Any,
        keep: Callable[[Any], Any] = copy_to_host,
        fed: Mapping[str, NDArray] | None = None,
    ):
        super().__init__({}, outline, inputs, lambda function, value: (value, function))
        self._fed = fed or {}
        self.paths = EveryPath()
        self.values: dict[str, Any] = {}
        self.repeated: set[str] = set()
        self._of = keep

    def at_input(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap) -> tuple[Any, Any]:
        """Implements `Table.at_input`."""
        if f"{path}:input" in self._fed and args:
            args = (self._replaced(f"{path}:input", args[0]), *args[1:])
        for k, (name, value) in enumerate([*((str(k), arg) for k, arg in enumerate(args)), *kwargs.items()]):
            self._keep(path, f":input[{name}]" if k else ":input", value)
        return args, kwargs

    def at_output(self, path: str, output: Any, tap: Tap) -> Any:
        """Implements `Table.at_output`."""
        self._meet(path)
        output = self._replaced(path, output)
        for name, value in elements(output).items():
            changed = self._replaced(f"{path}[{name}]", value)
            output = output if changed is value else with_element(output, name, changed)
            self._keep(path, f"[{name}]", changed)
        self._keep(path, "", output)
        return output

    def at_name(self, name: str, value: Any, tap: Tap) -> Any:
        """Implements `Table.at_name`."""
        self._meet(counted(name))
        value = self._replaced(counted(name), value)
        self._keep(counted(name), "", value)
        return value

    def _replaced(self, key: str, value: Any) -> Any:
        if key not in self._fed:
            return value
        if hasattr(value, "new_tensor"):
            return value.new_tensor(self._fed[key])
        return jnp.asarray(self._fed[key], value.dtype)

    def _meet(self, path: str) -> None:
        if path in self.met:
            self.repeated.add(path)
        self.met.add(path)

    def _keep(self, path: str, suffix: str, value: Any) -> None:
        # A value inside the model's own transformation cannot be read.
        if path and hasattr(value, "shape") and not isinstance(value, jax.core.Tracer) and _is_float(value):
            self.values[path + suffix] = self._of(value)


def _is_float(value: Any) -> bool:
    return bool(value.is_floating_point()) if hasattr(value, "is_floating_point") else is_float(value)
