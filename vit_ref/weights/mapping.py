"""The weight map: applies the rules of a layout, and inverts them, with a check of completeness.

A layout writes each parameter exactly once. It reads each source tensor exactly once, whole or in equal parts, unless
the caller names the tensor in `ignore`. `MappingError` lists all faults at once. Values are moved and never computed
with, so each tensor keeps its bits and its dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import Fault, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.weights.layouts import LAYOUTS, Layout, Rule
from vit_ref.weights.tensor_files import LazyTensors, rename_tensors
from vit_ref.weights.wrappers import guess_wrapper

Tensors = Mapping[str, NDArray]
_WEIGHT_DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


@contextmanager
def name_checkpoint_in_errors(path: Path) -> Iterator[None]:
    """Adds the path of the checkpoint to a `MappingError` raised within it."""
    try:
        yield
    except MappingError as error:
        raise MappingError(error.faults, error.layout, path) from None


def detect(names: Iterable[str]) -> Layout:
    """Returns the layout that recognises most names.

    Args:
      names: names of the tensors in a checkpoint.

    Raises:
      MappingError: no layout recognises any of them.
    """
    names = tuple(names)
    scores = {layout.name: layout.recognises(names) for layout in LAYOUTS.values()}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        shown = ", ".join(sorted(names)[:3]) or "there are none"
        said = f"no known layout ({', '.join(LAYOUTS)}) has such names: {shown}"
        prefix, others = guess_wrapper(names)
        if prefix:
            said += (
                f"; the prefix {prefix!r} is removed only if all names begin with it, and {len(others)} of"
                f" {len(names)} do not, first {min(others)}: leave these out with --ignore PATTERN, or"
                " ignore=[PATTERN] in Python"
            )
        raise MappingError([Fault("unrecognised", "all tensors", said)], "unknown")
    return LAYOUTS[best]


def port(
    source: Tensors, config: ViTConfig, layout: Layout, *, ignore: Iterable[str] = (), finite: bool = True
) -> dict[str, NDArray]:
    """Applies the rules of a layout.

    Args:
      source: name in the layout -> tensor.
      config: configuration of the model to fill.
      layout: the layout of the names, from `detect`.
      ignore: names or patterns (`*`, `?`) of source tensors to leave behind.
      finite: whether all values have to be finite. Gradients, which have the names of parameters, may overflow.

    Returns:
      Path -> parameter, with the paths and shapes of `list_parameters(config)`, and with the source's dtypes and bits.

    Raises:
      MappingError: a tensor is missing, unexpected, misshapen, not finite, or of a dtype that weights cannot have. Or a
        pattern to ignore matches nothing. The error lists every such fault.
    """
    return dict(port_each(source, config, layout, ignore=ignore, finite=finite))


def port_each(
    source: Tensors, config: ViTConfig, layout: Layout, *, ignore: Iterable[str] = (), finite: bool = True
) -> Iterator[tuple[str, NDArray]]:
    """Applies the rules of a layout to one tensor at a time. It does not hold a tensor while it reads the next.

    Args:
      source: name in the layout -> tensor. From a `LazyTensors` nothing is read before all names and shapes fit.
      config: configuration of the model to fill.
      layout: the layout of the names, from `detect`.
      ignore: names or patterns (`*`, `?`) of source tensors to leave behind.
      finite: whether all values have to be finite.

    Yields:
      Paths and parameters. After a fault it yields no more, but goes on looking for other faults.

    Raises:
      MappingError: see `port`.
    """
    by_source = _by_source(layout.bind(config, prefixed=is_prefixed(source, layout)))
    faults = _find_shape_faults(source, config, by_source)
    wrong = {fault.name for fault in faults}
    shaped = {name: rules for name, rules in by_source.items() if name not in wrong}
    ignore = tuple(ignore)
    left_over = source.keys() - by_source.keys()
    faults += [
        Fault("unexpected", name, f"it has shape {_shape(source, name)}, and no rule takes it{_described(name)}")
        for name in sorted(left_over)
        if not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    faults += _stale(ignore, left_over)
    for name, rules in shaped.items():
        tensor = np.asarray(source[name])
        if tensor.dtype not in _WEIGHT_DTYPES:
            known = "float64, float32, float16 or bfloat16"
            faults.append(Fault("unusable dtype", name, f"it is {tensor.dtype}: convert the weights to {known}"))
        elif finite and (where := _first_not_finite(tensor)) is not None:
            faults.append(Fault("not finite", name, f"it has {tensor[where]} at {where}"))
        elif not faults:
            for rule in rules:
                part = np.split(tensor, rule.parts)[rule.part] if rule.parts > 1 else tensor
                yield rule.destination, np.ascontiguousarray(rule.transform.to_parameter(part, config))
                del part
        del tensor
    if faults:
        raise MappingError(faults, layout.name)


def require_shapes(source: Tensors, config: ViTConfig, layout: Layout) -> None:
    """Checks names and shapes of the tensors that a model needs. It reads no values of `LazyTensors`.

    Args:
      source: name in the layout -> tensor.
      config: configuration of the model.
      layout: the layout of the names, from `detect`.

    Raises:
      MappingError: a tensor is missing or misshapen.
    """
    by_source = _by_source(layout.bind(config, prefixed=is_prefixed(source, layout)))
    if faults := _find_shape_faults(source, config, by_source):
        raise MappingError(faults, layout.name)


def _find_shape_faults(source: Tensors, config: ViTConfig, by_source: Mapping[str, list[Rule]]) -> list[Fault]:
    shapes = list_parameters(config)
    faults = []
    for name, rules in by_source.items():
        shape = compute_source_shape(rules[0], shapes[rules[0].destination], config)
        wanted = f"it should have shape {shape} for {', '.join(rule.destination for rule in rules)}"
        if name not in source:
            faults.append(Fault("missing", name, wanted))
        elif (actual := _shape(source, name)) != shape:
            faults.append(Fault("misshapen", name, f"{wanted}, and has {actual}"))
    return faults


def drop_ignored(source: Tensors, config: ViTConfig, ignore: Iterable[str]) -> Tensors:
    """Returns the tensors of a checkpoint without those to leave behind, for callers that take tensors by name.

    Args:
      source: name in the layout -> tensor.
      config: configuration of the model to fill. No tensor that it needs is left behind.
      ignore: names or patterns (`*`, `?`) of tensors to leave behind.

    Raises:
      MappingError: a pattern matches nothing, or the layout is unknown.
    """
    ignore = tuple(ignore)
    if not ignore:
        return source
    layout = detect(source)
    left_over = source.keys() - _by_source(layout.bind(config, prefixed=is_prefixed(source, layout))).keys()
    if stale := _stale(ignore, left_over):
        raise MappingError(stale, layout.name)
    left_behind = {name for name in left_over if any(fnmatchcase(name, pattern) for pattern in ignore)}
    return rename_tensors(source, {name: name for name in source if name not in left_behind})


def _stale(ignore: tuple[str, ...], left_over: Iterable[str]) -> list[Fault]:
    return [
        Fault("stale ignore", pattern, "it matches no left-over tensor: remove the pattern")
        for pattern in ignore
        if not any(fnmatchcase(name, pattern) for name in left_over)
    ]


# Patterns of tensors that other heads and other stages of training leave in a checkpoint.
_UNUSED = "and no output of this model depends on it"
_LEFT_OVER = {
    "*mask_token": f"it is the mask token of masked-image pretraining, {_UNUSED}",
    "*decoder*": f"it belongs to the decoder of masked-image pretraining, {_UNUSED}",
    "*pooler*": "it belongs to a pooler, and a classifier's head reads the cls token without one",
    "pre_logits*": "it belongs to a pre-logits layer, and Hugging Face's heads read the cls token without one",
    "*dist*_token": "it is DeiT's token for distillation, which attention sees: this is another model",
    "*lora_*": "it belongs to a LoRA adapter, which changes the weights: merge it into them first",
}


def _described(name: str) -> str:
    """Returns what is known of a tensor that no rule takes, for the end of a message."""
    known = next((what for pattern, what in _LEFT_OVER.items() if fnmatchcase(name, pattern)), "")
    return f": {known}" if known else ""


def export(parameters: Tensors, config: ViTConfig, layout: Layout) -> dict[str, NDArray]:
    """Inverts the rules of a layout: `export(port(source)) == source`, bit for bit.

    Args:
      parameters: path -> parameter, as `port` returns them.
      config: the model's configuration.
      layout: the layout to write.

    Returns:
      Name in the layout -> tensor. A classifier's names have the layout's prefix, a headless model's do not.

    Raises:
      MappingError: the layout cannot store a parameter.
    """
    tensors, faults = {}, []
    for name, rules in _by_source(layout.bind(config, prefixed=bool(config.num_labels))).items():
        parts = []
        for rule in sorted(rules, key=lambda rule: rule.part):
            value = np.asarray(parameters[rule.destination])
            if unfit := rule.transform.unfit(value):
                faults.append(Fault("unfit", rule.destination, f"{unfit}, and {name} cannot store it"))
            parts.append(rule.transform.to_source(value, config))
        tensors[name] = np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])
    if faults:
        raise MappingError(faults, layout.name)
    return tensors


def _by_source(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Groups rules by the tensor that they share, in the order of the first."""
    shared: dict[str, list[Rule]] = {}
    for rule in rules:
        shared.setdefault(rule.source, []).append(rule)
    return shared


def is_prefixed(names: Iterable[str], layout: Layout) -> bool:
    """Tells whether these names have the layout's prefix: most names of the body do."""
    body = [name for name in names if not name.startswith(layout.head)]
    return 2 * sum(name.startswith(layout.prefix) for name in body) > len(body)


def _first_not_finite(tensor: NDArray) -> tuple[int, ...] | None:
    # numpy would warn about a signalling NaN in half precision, and this function looks for NaN.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(tensor)
    return None if finite.all() else tuple(int(k) for k in np.argwhere(~finite)[0])


def _shape(source: Tensors, name: str) -> tuple[int, ...]:
    return source.shape(name) if isinstance(source, LazyTensors) else np.shape(source[name])


def compute_source_shape(rule: Rule, shape: tuple[int, ...], config: ViTConfig) -> tuple[int, ...]:
    """Returns the shape of the source tensor whose whole, or whose parts, become parameters of this shape."""
    # The transform itself maps the shape. One byte broadcast to the shape needs no memory.
    part = rule.transform.to_source(np.broadcast_to(np.zeros((), np.int8), shape), config).shape
    return part[0] * rule.parts, *part[1:]
