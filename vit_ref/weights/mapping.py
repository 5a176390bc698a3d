"""The weight map: applies the rules of a layout, and inverts them, under a completeness check.

A layout writes every destination exactly once. It consumes every source tensor exactly once, whole or in equal parts by
as many rules, unless the caller names it in `ignore`. `MappingError` lists every fault at once. Values are moved, never
computed with: each tensor keeps its bits and its dtype.
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
    """Says of a `MappingError` from within which checkpoint has the faults."""
    try:
        yield
    except MappingError as error:
        raise MappingError(error.faults, error.layout, path) from None


def detect(names: Iterable[str]) -> Layout:
    """The layout that recognises most of `names`.

    Raises:
      MappingError: none recognises any.
    """
    names = tuple(names)
    scores = {layout.name: layout.recognises(names) for layout in LAYOUTS.values()}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        shown = ", ".join(sorted(names)[:3]) or "none at all"
        said = f"no known layout ({', '.join(LAYOUTS)}) has such names: {shown}"
        prefix, others = guess_wrapper(names)
        if prefix:
            said += (
                f"; {prefix!r} would be stripped if all names began with it, and {len(others)} of {len(names)} begin"
                f" otherwise, first {min(others)}: leave these behind with --ignore PATTERN, or ignore=[PATTERN] in"
                " Python"
            )
        raise MappingError([Fault("unrecognised", "all tensors", said)], "unknown")
    return LAYOUTS[best]


def port(
    source: Tensors, config: ViTConfig, layout: Layout, *, ignore: Iterable[str] = (), finite: bool = True
) -> dict[str, NDArray]:
    """Applies a layout's rules.

    Args:
      source: tensors by their names in the layout.
      config: the model to fill.
      layout: the names' layout; `detect` finds it.
      ignore: names or patterns (`*`, `?`) of source tensors to leave behind on purpose.
      finite: whether values have to be. Gradients, which have their parameters' names, may overflow.

    Returns:
      Parameters by path, as many and as shaped as `list_parameters(config)`; dtypes and bits are the source's.

    Raises:
      MappingError: with every missing, unexpected, misshapen and non-finite tensor, every one in a dtype that weights
        cannot have, and every pattern to ignore that names nothing.
    """
    return dict(port_each(source, config, layout, ignore=ignore, finite=finite))


def port_each(
    source: Tensors, config: ViTConfig, layout: Layout, *, ignore: Iterable[str] = (), finite: bool = True
) -> Iterator[tuple[str, NDArray]]:
    """Applies a layout's rules to one tensor after the other, none of which is held while the next is read.

    Args:
      source: as `port` takes it. Of a `LazyTensors` nothing is read before names and shapes are known to fit.
      config: as there.
      layout: as there.
      ignore: as there.
      finite: as there.

    Yields:
      Paths and parameters. Once a fault is known there are no more; what remains is looked through for others.

    Raises:
      MappingError: as `port` does.
    """
    by_source = _by_source(layout.bind(config, prefixed=is_prefixed(source, layout)))
    shapes = list_parameters(config)
    faults = []
    shaped = {}
    for name, rules in by_source.items():
        shape = compute_source_shape(rules[0], shapes[rules[0].destination], config)
        wanted = f"expected {shape} for {', '.join(rule.destination for rule in rules)}"
        if name not in source:
            faults.append(Fault("missing", name, wanted))
        elif (found := _shape(source, name)) != shape:
            faults.append(Fault("misshapen", name, f"{wanted}, found {found}"))
        else:
            shaped[name] = rules
    ignore = tuple(ignore)
    left_over = source.keys() - by_source.keys()
    faults += [
        Fault("unexpected", name, f"shape {_shape(source, name)}, no rule takes it{_described(name)}")
        for name in sorted(left_over)
        if not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    faults += _stale(ignore, left_over)
    for name, rules in shaped.items():
        tensor = np.asarray(source[name])
        if tensor.dtype not in _WEIGHT_DTYPES:
            known = "float64, float32, float16 or bfloat16"
            faults.append(Fault("unusable dtype", name, f"{tensor.dtype}: weights have to be {known}"))
        elif finite and (where := _first_not_finite(tensor)) is not None:
            faults.append(Fault("not finite", name, f"{tensor[where]} at {where}"))
        elif not faults:
            for rule in rules:
                part = np.split(tensor, rule.parts)[rule.part] if rule.parts > 1 else tensor
                yield rule.destination, np.ascontiguousarray(rule.transform.to_parameter(part, config))
                del part
        del tensor
    if faults:
        raise MappingError(faults, layout.name)


def drop_ignored(source: Tensors, config: ViTConfig, ignore: Iterable[str]) -> Tensors:
    """A checkpoint's tensors but those to leave behind, for whoever takes tensors by name.

    Args:
      source: tensors by their names in their layout.
      config: the model to fill; no tensor that it needs is left behind.
      ignore: names or patterns (`*`, `?`).

    Raises:
      MappingError: a pattern to ignore names nothing, or the layout is unknown.
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
        Fault("stale ignore", pattern, "matches no tensor that would be left over")
        for pattern in ignore
        if not any(fnmatchcase(name, pattern) for name in left_over)
    ]


# What other heads and other stages of training leave in a checkpoint, by patterns of its names.
_UNUSED = "which nothing that is computed here depends on"
_LEFT_OVER = {
    "*mask_token": f"it is the mask token of masked-image pretraining, {_UNUSED}",
    "*decoder*": f"it belongs to the decoder of masked-image pretraining, {_UNUSED}",
    "*pooler*": "it belongs to a pooler, and a classifier's head reads the cls token without one",
    "pre_logits*": "it belongs to a pre-logits layer, and a head of Hugging Face's reads the cls token without one",
    "*dist*_token": "it is DeiT's token for distillation, which attention sees: this is another model",
    "*lora_*": "it belongs to a LoRA adapter, which changes the weights: merge it into them first",
}


def _described(name: str) -> str:
    """What is known of a tensor that no rule takes, for the end of a message."""
    found = next((what for pattern, what in _LEFT_OVER.items() if fnmatchcase(name, pattern)), "")
    return f": {found}" if found else ""


def export(parameters: Tensors, config: ViTConfig, layout: Layout) -> dict[str, NDArray]:
    """Inverts a layout's rules: `export(port(source)) == source`, bit for bit.

    Args:
      parameters: by path, as `port` returns them.
      config: the model's configuration.
      layout: the layout to write.

    Returns:
      Tensors by their names in the layout. A classifier's carry the layout's prefix, a headless model's do not.

    Raises:
      MappingError: the layout has no room for a parameter.
    """
    tensors, faults = {}, []
    for name, rules in _by_source(layout.bind(config, prefixed=bool(config.num_labels))).items():
        parts = []
        for rule in sorted(rules, key=lambda rule: rule.part):
            value = np.asarray(parameters[rule.destination])
            if unfit := rule.transform.unfit(value):
                faults.append(Fault("unfit", rule.destination, f"{unfit}, and {name} has no room for it"))
            parts.append(rule.transform.to_source(value, config))
        tensors[name] = np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])
    if faults:
        raise MappingError(faults, layout.name)
    return tensors


def _by_source(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Rules by the tensor that they share, in the order of the first."""
    shared: dict[str, list[Rule]] = {}
    for rule in rules:
        shared.setdefault(rule.source, []).append(rule)
    return shared


def is_prefixed(names: Iterable[str], layout: Layout) -> bool:
    """Whether these names carry the layout's prefix: most of the body's do."""
    body = [name for name in names if not name.startswith(layout.head)]
    return 2 * sum(name.startswith(layout.prefix) for name in body) > len(body)


def _first_not_finite(tensor: NDArray) -> tuple[int, ...] | None:
    # A signalling NaN in half precision would make numpy warn that it met one, which is what is asked.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(tensor)
    return None if finite.all() else tuple(int(k) for k in np.argwhere(~finite)[0])


def _shape(source: Tensors, name: str) -> tuple[int, ...]:
    return source.shape(name) if isinstance(source, LazyTensors) else np.shape(source[name])


def compute_source_shape(rule: Rule, shape: tuple[int, ...], config: ViTConfig) -> tuple[int, ...]:
    """The shape in the layout of what becomes, whole or with its like, a parameter of this shape."""
    # One byte broadcast to the shape: the transform itself says what shape it comes from.
    part = rule.transform.to_source(np.broadcast_to(np.zeros((), np.int8), shape), config).shape
    return part[0] * rule.parts, *part[1:]
