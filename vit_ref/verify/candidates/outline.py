"""What a candidate is compared with, as its tables see it: the names and shapes of the model that decides."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

Shape = tuple[int, ...]


class Outline(Protocol):
    """The names that a candidate's tables may use.

    Attributes:
      output: the site of the output, which is the last.
      example: inputs whose shapes stand for any.
      takes_first: whether a submodule that returns a tuple stands for its first element.
    """

    output: str
    example: Any
    takes_first: bool

    def shapes(self, inputs: Any) -> Mapping[str, Shape]:
        """Returns every site with the shape of its value, in order.

        Args:
          inputs: arrays of any framework, as the engine has them: one array of images, or arrays by name.
        """
        ...

    def parameters(self) -> Mapping[str, Shape]:
        """Returns every parameter with its shape."""
        ...

    def numbers(self, pattern: str, known: Container[str]) -> Iterable[int]:
        """Returns the numbers that `{i}` in a name stands for."""
        ...

    def optional(self, what: str) -> Container[str]:
        """Returns names that a table may hold although this model lacks them; `what` is "sites" or "parameters"."""
        ...

    def goes_past(self, site: str) -> bool:
        """Tells whether the value that enters a submodule there is used elsewhere, too."""
        ...

    def recognise(self, gradients: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Returns the gradients whose names in this model it can tell without a table."""
        ...

    def require_output(self, output: Any, name: str) -> None:
        """Raises `CandidateError` where a candidate's output is not one of this model."""
        ...
