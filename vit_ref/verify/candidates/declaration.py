"""The declaration of a candidate: a `Candidate`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vit_ref.errors import CandidateError

# A site, or a parameter of this package's model. With a selection: a function that picks the site's value out of the
# candidate's, by indexing, transposing and reshaping only.
Target = str | tuple[str, Callable[[Any], Any]]
Mapped = Mapping[str, Target | Sequence[Target]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate, as the person who wrote it declares it.

    Attributes:
      load: `load(checkpoint)` or `load(checkpoint, dtype)`, called with the path of the checkpoint's directory or file
        and a NumPy dtype. It returns the model, filled from that checkpoint, in evaluation mode. The model is one of
        these:

        - an `nnx.Module`, a `torch.nn.Module`, or a pair `(linen module, variables)`, whose submodules are observed
          from outside;
        - a callable tree such as an `equinox.Module`;
        - a pair `(function, parameters)`, called as `function(parameters, pixels)`;
        - a function of the pixels.

        The model takes float images (B, height, width, C), or (B, C, height, width) in PyTorch. It returns one of
        these:

        - logits (B, classes), or, for a model without a head, the pooler's output or else the cls token (B, D);
        - an object with `.logits`;
        - a pair of logits and a mapping of named intermediates.

        A model with an argument `tap` receives a function `(name, value) -> value`, and passes its values through it.
        If `load` has no `dtype`, the float parameters are widened to float64 for the semantic gate. If it has, it must
        return a model that computes in that dtype. PyTorch promotes nothing, so its modules get `.to(dtype)` in every
        precision.
      sites: where the sites are, such as `{"blocks.{i}.attn.query": "block.{i}.attn.query"}`; None if the intermediates
        have the sites' own names. Keys:

        - A key is the path of a submodule, whose output is meant, or the name of an intermediate. Intermediates in
          nested mappings have one name each, such as "encoder.block{i}.norm".
        - `:input` after a path means the submodule's first argument. `[0]` or `[name]` after that picks an element of a
          tuple, a mapping or the arguments.
        - `{i}` is the number of the block, which may have leading zeros ("block07").
        - A key without `{i}`, for a site with it, means a value stacked over the blocks on its first axis.

        Values:

        - A value is a site. Axes that only need merging or splitting are fitted automatically.
        - `(site, selection)` picks a part or moves axes.
        - A list takes several sites from one output.
      parameters: the same for the gradients of parameters: the candidate's paths to this package's (see
        `list_parameters`). None: they are recognised by the names of a known layout, or else not observed.
      call: `call(model, pixels)`, if the model needs other arguments than the images.
      channels_first: whether images are passed as (B, C, height, width). None: only to PyTorch.
      adapt: for `compare`: `adapt(**inputs)` turns the inputs, NumPy arrays, into this side's arguments: a mapping of
        keyword arguments, a tuple of positional ones, or one array. It may only move elements, or add integer arrays.
        None: one input is the first positional argument, and several are keyword arguments.
      output: `output(returned)` picks the output that is compared: an array (B, ...), or several in a mapping or a
        tuple. None: `.logits`, the value itself, or its first element.
      name: the candidate's name in reports.
      directory: the directory of the candidate's file, from which it may import; None if it was not found in a file.
    """

    load: Callable[..., Any]
    sites: Mapped | None = None
    parameters: Mapped | None = None
    call: Callable[..., Any] | None = None
    channels_first: bool | None = None
    adapt: Callable[..., Any] | None = None
    output: Callable[[Any], Any] | None = None
    name: str = "candidate"
    directory: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Candidate):
    """The declaration of a reference: any model in PyTorch, NNX, linen, equinox or plain JAX.

    Attributes:
      sites: its own paths -> names of sites. None: the outputs of all its named submodules, in the order of the pass. A
        site then has the submodule's path. In a tuple the first element has the path, and element k is `path:k`. In a
        mapping or a dataclass a field is `path:field`.
      inputs: `inputs(seed)` returns the inputs: NumPy arrays by name. The first axis of each is the batch.
      attention: whether the eager and the fused attention of a model from transformers must agree.
    """

    inputs: Callable[[int], Mapping[str, Any]] | None = None
    attention: bool = True
    name: str = "reference"


def declared(value: Any, name: str) -> Candidate:
    """Returns a `Candidate` from whatever the caller gave.

    Args:
      value: a `Candidate`, or a function from pixels to logits.
      name: the candidate's name, unless it has one.

    Raises:
      CandidateError: it is neither.
    """
    if isinstance(value, Candidate):
        return value if value.name not in ("candidate", "reference") else dataclasses.replace(value, name=name)
    if callable(value) and not inspect.isclass(value):
        return Candidate(load=lambda checkpoint: value, name=name)
    raise CandidateError(
        f"{name}: it has the type {type(value).__name__}: give FILE.py or module:attr as text, a"
        " vit_ref.Candidate, or a function of the inputs"
    )


def hint(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: the known name that was probably meant, or "".

    Args:
      name: the unknown name.
      known: the known names.
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Tells whether a callable takes an argument of that name.

    Args:
      function: the callable.
      argument: the argument's name.
    """
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def list_keywords(function: Callable[..., Any]) -> list[str] | None:
    """Returns the names of the keyword arguments that a callable takes; None if it takes any, or if they are unknown.

    Args:
      function: the callable.
    """
    try:
        # A decorator may take other names than the function that it wraps.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
