"""What a person writes to have a port of their own judged: a `Candidate`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vit_ref.errors import CandidateError

# A site (or a parameter of this package's model), or one with a selection: a function that picks the site's value out
# of the port's, by indexing, transposing and reshaping only.
Target = str | tuple[str, Callable[[Any], Any]]
Mapped = Mapping[str, Target | Sequence[Target]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A port under test, as declared by the person who wrote it.

    Attributes:
      load: `load(checkpoint)` or `load(checkpoint, dtype)`, with the path of the checkpoint's directory or file and a
        NumPy dtype. It returns the port, filled from that checkpoint, in evaluation mode:

        - an `nnx.Module`, a `torch.nn.Module`, or a pair `(linen module, variables)`: submodules are observed from
          outside;
        - a callable tree such as an `equinox.Module`, a pair `(function, parameters)` called as
          `function(parameters, pixels)`, or a function of the pixels.

        Any of them, called with images (B, height, width, C) - (B, C, height, width) for PyTorch - returns the logits
        (B, classes), or of a model without a head the pooler's output or else the cls token (B, D); or an object with
        `.logits`, or a pair of logits and a mapping of named intermediates. One that takes an argument `tap` is given a
        function `(name, value) -> value` to pass its values through.

        A loader without `dtype` gets its float parameters widened to float64 for the semantic gate; one with it
        computes in that dtype. PyTorch promotes nothing, so that `.to(dtype)` is done to its modules in any precision.
      sites: where the sites are: `{"blocks.{i}.attn.query": "block.{i}.attn.query"}`. A key is the path of a submodule,
        whose output is meant, or of a named intermediate. `:input` after it means the submodule's first argument, and
        `[0]` or `[name]` after that an element of a tuple, a mapping or the arguments. Values are sites; `(site,
        selection)` picks a part or moves axes; a list of them takes several sites from one output. Axes that only need
        merging or splitting fit by themselves. `{i}` is the block's number, which the port may write with zeros before
        it ("block07"); a key without it, for a site with it, is a value stacked over the blocks on its first axis.
        Intermediates in mappings of mappings have one name each, as "encoder.block{i}.norm". None: intermediates bear
        the sites' own names.
      parameters: the same for gradients of parameters: the port's paths to this package's (see
        `list_parameters`). None: recognised by a known layout's names, or else not observed.
      call: `call(port, pixels)` where the port wants other arguments than the images.
      channels_first: whether the images are handed over as (B, C, height, width); None: to PyTorch alone.
      adapt: for `compare`: `adapt(**inputs)` makes this side's arguments of the inputs, NumPy arrays: a mapping of
        keyword arguments, a tuple of positional ones, or one array. It only moves elements, or adds arrays of integers.
        None: one input is the first positional argument, several are keyword arguments.
      output: `output(returned)` picks the output that is compared: an array (B, ...), or several in a mapping or a
        tuple. None: `.logits`, the value itself, or its first element.
      name: how reports call it.
      directory: where what it imports lies beside it; set where it was found in a file.
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
    """An implementation that decides: any PyTorch, NNX, linen, equinox or plain JAX model, declared as a candidate is.

    Attributes:
      sites: from its own paths to the names of sites. None: the outputs of all its named submodules under their paths,
        in the order in which they come. Of a tuple the first element has the path, element k is `path:k`; a field of a
        mapping or a dataclass is `path:field`.
      inputs: `inputs(seed)` makes the inputs: NumPy arrays by name, of which the first axis is the batch.
      attention: whether the eager and the fused attention of a model from transformers have to agree.
    """

    inputs: Callable[[int], Mapping[str, Any]] | None = None
    attention: bool = True
    name: str = "reference"


def declared(value: Any, name: str) -> Candidate:
    """A `Candidate` from what a person gave: one already, or a function from pixels to logits.

    Raises:
      CandidateError: it is neither.
    """
    if isinstance(value, Candidate):
        return value if value.name not in ("candidate", "reference") else dataclasses.replace(value, name=name)
    if callable(value) and not inspect.isclass(value):
        return Candidate(load=lambda checkpoint: value, name=name)
    raise CandidateError(
        f"{name}: a {type(value).__name__}: give a vit_ref.Candidate, or a function from pixels to logits"
    )


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that was probably meant, or ""."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a callable takes an argument of that name."""
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
