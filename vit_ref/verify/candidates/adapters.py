"""Splits each kind of JAX candidate into parameters and a forward pass, and observes it while it is traced.

Submodules are observed from outside: nnx's by wrapping the `__call__` of their classes, linen's by flax's method
interception. A value without a submodule can be shown in three ways:

- as the input of the next submodule;
- as a named intermediate;
- through a tap, if the candidate takes one.

Without a tap the candidate is called as its users call it. Values inside a candidate's own transformation (`nnx.jit`,
`jax.vmap`, a scan) cannot be observed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.errors import TraceContextError
from jax.typing import DTypeLike

from vit_ref.errors import CandidateError
from vit_ref.model.vit import identity
from vit_ref.verify.candidates.declaration import hint, takes
from vit_ref.verify.candidates.feeding import Arguments
from vit_ref.verify.candidates.loading import split_named
from vit_ref.verify.candidates.table import Table, counted
from vit_ref.verify.compare.trace import Tap

# (parameters, arguments, table, tap) -> whatever the candidate returns.
Run = Callable[[Any, Arguments, Table, Tap | None], Any]
Call = Callable[..., Any]


def adapted(loaded: Any, call: Call | None, name: str, dtype: DTypeLike) -> tuple[Any, Run]:
    """Returns a model's parameters, which may be any tree, and its forward pass.

    Args:
      loaded: what a candidate's loader returned.
      call: see `Candidate.call`.
      name: the candidate's name, for messages.
      dtype: the dtype of the computation. Float64 widens arrays that are not parameters, too, such as statistics.

    Raises:
      CandidateError: it cannot be called.
    """
    if isinstance(loaded, nnx.Module):
        return _nnx(loaded, call, name, dtype)
    if isinstance(loaded, tuple) and len(loaded) == 2 and isinstance(loaded[0], linen.Module):
        return _linen(loaded[0], loaded[1], call, name, dtype)
    if isinstance(loaded, tuple) and len(loaded) == 2 and callable(loaded[0]):
        return _function(*loaded, call)
    if not callable(loaded):
        raise CandidateError(
            f"{name}: load() returned a {type(loaded).__name__}: return one of the models that vit_ref.Candidate lists"
        )
    return _tree(loaded, call)


def _nnx(loaded: nnx.Module, call: Call | None, name: str, dtype: DTypeLike) -> tuple[Any, Run]:
    graph, parameters, rest = nnx.split(loaded, nnx.Param, ...)  # type: ignore[misc]  # flax's overloads
    rest = _wide_enough(rest, dtype)

    def run(parameters: Any, arguments: Arguments, table: Table, tap: Tap | None) -> Any:
        # It must be a copy. nnx refuses to change a variable that belongs to an outer trace, and transformations such
        # as `nnx.remat` write back all variables, changed or not.
        model = nnx.merge(graph, parameters, rest, copy=True)
        taps = takes(call or model, "tap")
        # A model that passes its values through a tap would show them twice.
        seen = () if taps else nnx.iter_modules(model)
        modules = {counted(".".join(map(str, parts))): module for parts, module in seen}
        try:
            with _watching(modules, table, tap):
                returned = _called(model, arguments, call, table, tap)
        except TraceContextError as error:
            reason = str(error).partition(" (")[0]
            raise CandidateError(
                f"{name}: the forward pass changes state outside the model ({reason}): make that state part of the"
                " model, and load it in evaluation mode"
            ) from error
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            require_same(model, arguments, table, returned)
        require_known(table, table.met if taps else modules, returned, model)
        return returned

    def require_same(model: nnx.Module, arguments: Arguments, table: Table, returned: Any) -> None:
        """Raises an error if the forward pass changed the model's state and so the output of the next pass."""
        changed = _changed(rest, model)
        gathered = [path for path, variable in changed.items() if not isinstance(variable, nnx.RngState)]
        if not changed:
            return
        # An nnx module that wraps a linen module draws a key for each call, even if it does not use it.
        if not gathered and _same(_called(model, arguments, call, table, None), returned):
            return
        raise CandidateError(
            f"{name}: the forward pass changes the model's own state, {next(iter(gathered or changed))!r}"
            f"{'' if gathered else ', and its next output'}: dropout may be active, or statistics be updated: load the"
            " model in evaluation mode"
        )

    return parameters, run


def _wide_enough(tree: Any, dtype: DTypeLike) -> Any:
    """Returns a tree of arrays, with floats widened if the computation is in float64."""
    if np.dtype(dtype) != np.float64:
        return tree
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) if is_float(leaf) else leaf, tree)


def _changed(before: nnx.State, model: nnx.Module) -> dict[str, Any]:
    """Returns the variables of a model whose value changed, by path."""
    after = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(before)
        if path in after and not _same(_value(after[path]), _value(variable))
    }


def _value(variable: Any) -> Any:
    """Returns a variable's value. A module may hold plain arrays beside its variables."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _same(one: Any, other: Any) -> bool:
    """Tells whether two trees of arrays are equal. They may hold random keys."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(_bits(left), _bits(right), equal_nan=True) for left, right in pairs)


def _bits(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _linen(module: linen.Module, variables: Any, call: Call | None, name: str, dtype: DTypeLike) -> tuple[Any, Run]:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise CandidateError(
            f"{name}: load() returned a linen module with a {type(variables).__name__} without 'params': return"
            " (module, {'params': parameters})"
        )

    # A box holds the division of a parameter among devices, which is not part of its name.
    parameters = linen.meta.unbox(variables["params"])
    variables = _wide_enough({kind: each for kind, each in variables.items() if kind != "params"}, dtype)

    def run(parameters: Any, arguments: Arguments, table: Table, tap: Tap | None) -> Any:
        met: set[str] = set()

        def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = counted(".".join(context.module.path))
            met.add(path)
            if tap is None or context.method_name != "__call__" or path not in table.paths:
                return method(*args, **kwargs)
            args, kwargs = table.at_input(path, args, kwargs, tap)
            return table.at_output(path, method(*args, **kwargs), tap)

        with linen.intercept_methods(intercept):
            model = module.bind({**variables, "params": parameters})
            returned = _called(model, arguments, call, table, tap)
        require_known(table, table.met if takes(call or model, "tap") else met, returned)
        return returned

    return parameters, run


def _tree(loaded: Any, call: Call | None) -> tuple[Any, Run]:
    """Splits a callable tree, such as an equinox module. A function has no parameters."""
    parameters, filled = _floats(loaded)

    def run(parameters: Any, arguments: Arguments, table: Table, tap: Tap | None) -> Any:
        return _called(filled(parameters), arguments, call, table, tap)

    return parameters, run


def _function(function: Call, tree: Any, call: Call | None) -> tuple[Any, Run]:
    """Splits a function of parameters and inputs."""
    parameters, filled = _floats(tree)

    def run(parameters: Any, arguments: Arguments, table: Table, tap: Tap | None) -> Any:
        if call is not None:
            return _called((function, filled(parameters)), arguments, call, table, tap)
        return function(filled(parameters), *arguments.args, **arguments.kwargs, **tapping(function, table, tap))

    return parameters, run


def _floats(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns the float arrays of a tree by path, which are its parameters, and a function that replaces them.

    Other leaves stay as they are, such as a number of heads, an epsilon or a key. A state of nnx holds only parameters,
    under nnx's own names.
    """
    if isinstance(tree, nnx.State):
        return tree, lambda values: values
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    structure = jax.tree.structure(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    parameters = {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True) if is_float(leaf)}

    def filled(values: Mapping[str, Any]) -> Any:
        both = [values.get(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
        return jax.tree.unflatten(structure, both)

    return parameters, filled


def _called(model: Any, arguments: Arguments, call: Call | None, table: Table, tap: Tap | None) -> Any:
    args, kwargs = arguments
    if call is not None:
        return call(model, *args, **kwargs, **tapping(call, table, tap))
    return model(*args, **kwargs, **tapping(model, table, tap))


def tapping(function: Call, table: Table, tap: Tap | None) -> dict[str, Any]:
    """Returns the tap as a keyword argument, for a function that takes one.

    A function that requires a tap gets `identity` if there is none. This package's model, which the function may call,
    treats `identity` as no tap.

    Args:
      function: the model or its `call`.
      table: the candidate's table, which translates names into sites.
      tap: called with every site and its value; None for no tap.
    """
    if not takes(function, "tap"):
        return {}
    if tap is not None:
        return {"tap": lambda name, value: table.at_name(name, value, tap)}
    required = inspect.signature(function).parameters["tap"].default is inspect.Parameter.empty
    return {"tap": identity} if required else {}


@contextlib.contextmanager
def _watching(modules: Mapping[str, nnx.Module], table: Table, tap: Tap | None) -> Iterator[None]:
    if tap is None:
        yield
        return
    watched = {id(modules[path]): path for path in table.paths & modules.keys()}

    def observed(cls: type, method: Call) -> Call:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            # A subclass that calls its parent's method is observed once, as the subclass.
            if type(self) is not cls or id(self) not in watched:
                return method(self, *args, **kwargs)
            path = watched[id(self)]
            args, kwargs = table.at_input(path, args, kwargs, tap)
            return table.at_output(path, method(self, *args, **kwargs), tap)

        return __call__

    with contextlib.ExitStack() as stack:
        for cls in {type(modules[path]) for path in watched.values()}:
            stack.enter_context(mock.patch.object(cls, "__call__", observed(cls, cls.__call__)))
        yield


def require_known(table: Table, modules: Iterable[str], returned: Any, model: Any = None) -> None:
    """Checks that each name of a table is a submodule, a name given to the tap, or a returned intermediate.

    Args:
      table: the candidate's table.
      modules: paths of submodules, or names that were given to the tap. A mapping from paths to submodules lets the
        message name a module that has two paths.
      returned: what the model returned.
      model: the model that has these submodules.

    Raises:
      CandidateError: a name is unknown.
    """
    known = {*modules, *split_named(returned)[1]}
    for path in sorted(table.paths - known):
        found = _at(model, path)
        for name, module in modules.items() if isinstance(modules, Mapping) else ():
            if module is found:
                raise CandidateError(
                    f"sites: {path!r} and {name!r} are one module with one set of parameters: make a module for each"
                )
        raise CandidateError(
            f"sites: it has no submodule {path!r} and returns no value of that name{hint(path, known)}"
        )


def _at(model: Any, path: str) -> Any:
    """Returns the object at a path of attributes and indices; None if there is none."""
    try:
        for key in path.split("."):
            model = model[int(key)] if key.isdecimal() else getattr(model, key)
    except (AttributeError, LookupError, TypeError):
        return None
    return model


def is_float(leaf: Any) -> bool:
    """Tells whether a leaf is an array of floats, and so a parameter.

    Args:
      leaf: a leaf of a tree.
    """
    return isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating)
