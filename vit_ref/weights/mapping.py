"""The weight map: one table of rules per checkpoint layout, applied and inverted under a completeness check.

A rule is one line, a source name <-> a destination path with an invertible transform; `{i}` stands for the block's
number. Every destination is written exactly once and every source tensor is consumed exactly once, whole or in equal
parts by as many rules, unless the caller names it in `ignore`; `MappingError` lists every fault at once. Values are
moved, never computed with: each tensor keeps its bits and its dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from vit_ref.errors import Fault, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import skeleton
from vit_ref.weights.checkpoint import LazyTensors, rename_tensors
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


class Transform(NamedTuple):
    """How a source tensor becomes a parameter, and back. Both directions only move elements, or add and drop zeros.

    Attributes:
      to_parameter: from the layout to the model.
      to_source: from the model to the layout.
      unfit: what of a parameter the layout has no room for, "" where it has room for all.
    """

    to_parameter: Callable[[NDArray, ViTConfig], NDArray]
    to_source: Callable[[NDArray, ViTConfig], NDArray]
    unfit: Callable[[NDArray], str] = lambda x: ""


SAME = Transform(lambda x, c: x, lambda x, c: x)
# PyTorch's Linear keeps (out, in), flax (in, out).
LINEAR = Transform(lambda x, c: x.T, lambda x, c: x.T)
# PyTorch's Conv2d keeps (out, in, height, width), flax (height, width, in, out).
CONV = Transform(lambda x, c: x.transpose(2, 3, 1, 0), lambda x, c: x.transpose(3, 2, 0, 1))
# flax's attention keeps heads apart: kernel (D, H, K) and bias (H, K) going in, kernel (H, K, D) coming out.
HEADS_KERNEL = Transform(
    lambda x, c: x.reshape(len(x), -1),
    lambda x, c: x.reshape(len(x), c.num_attention_heads, -1),
)
HEADS_BIAS = Transform(lambda x, c: x.reshape(-1), lambda x, c: x.reshape(c.num_attention_heads, -1))
HEADS_OUT = Transform(
    lambda x, c: x.reshape(-1, x.shape[-1]),
    lambda x, c: x.reshape(c.num_attention_heads, -1, x.shape[-1]),
)
# big_vision adds positions before it puts the cls token in front, which is to add zero there. Anything else, and a
# negative zero, would not come back.
GRID_POSITIONS = Transform(
    lambda x, c: np.concatenate([np.zeros_like(x[:, :1]), x], axis=1),
    lambda x, c: x[:, 1:],
    lambda x: "the cls token's position is not zero" if x[:, 0].tobytes().strip(b"\0") else "",
)


class Rule(NamedTuple):
    """One line of the weight map.

    Attributes:
      source: the tensor's name in the layout.
      destination: the parameter's path in the model.
      transform: how one becomes the other.
      part: where several rules share a source, which of its equal parts, counted along the first axis, is this one's.
      parts: how many such parts there are.
    """

    source: str
    destination: str
    transform: Transform = SAME
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to name and shape a ViT's weights.

    Attributes:
      name: how messages call it.
      rules: the weight map, `{i}` for the block's number.
      prefix: what a classifier's checkpoint writes before every name but the head's, and a headless one leaves out.
      head: the beginning of the head's names, which never carry the prefix.
    """

    name: str
    rules: tuple[Rule, ...]
    prefix: str = ""
    head: str = "classifier"

    def bind(self, config: ViTConfig, prefixed: bool) -> tuple[Rule, ...]:
        """The rules of one configuration, blocks counted out, in the order of the model's parameters.

        Raises:
          MappingError: the layout has no name for some of them, as timm's has none for a pooler.
        """
        rules = {rule.destination: rule for rule in self.rules}
        bound, nameless = [], []
        for destination in list_parameters(config):
            template, block = split_block_number(destination)
            if template not in rules:
                nameless.append(Fault("no rule", destination, "the layout has no name for it"))
                continue
            rule = rules[template]
            source = rule.source.replace("{i}", block)
            if prefixed and not source.startswith(self.head):
                source = self.prefix + source
            bound.append(rule._replace(source=source, destination=destination))
        if nameless:
            raise MappingError(nameless, self.name)
        return tuple(bound)

    def recognises(self, names: Iterable[str]) -> int:
        """How many of `names` could be this layout's, whatever the configuration."""
        known = {rule.source for rule in self.rules}
        return sum(split_block_number(name.removeprefix(self.prefix))[0] in known for name in names)


def split_block_number(name: str) -> tuple[str, str]:
    """A name with its block number replaced by `{i}`, and that number ("" without one)."""
    for separator in "./":
        parts = name.split(separator)
        for k, part in enumerate(parts):
            block = part.removeprefix("encoderblock_")
            if block.isdecimal():
                parts[k] = part[: len(part) - len(block)] + "{i}"
                return separator.join(parts), block
    return name, ""


def _dense(source: str, destination: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{destination}.kernel", LINEAR), Rule(f"{source}.bias", f"{destination}.bias")


def _norm(source: str, destination: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{destination}.scale"), Rule(f"{source}.bias", f"{destination}.bias")


def _linen_dense(source: str, destination: str, kernel: Transform = SAME, bias: Transform = SAME) -> tuple[Rule, Rule]:
    return Rule(f"{source}/kernel", f"{destination}.kernel", kernel), Rule(
        f"{source}/bias", f"{destination}.bias", bias
    )


def _linen_norm(source: str, destination: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}/scale", f"{destination}.scale"), Rule(f"{source}/bias", f"{destination}.bias")


# Hugging Face's PyTorch names up to transformers 4, which transformers 5 still writes.
HF = Layout(
    "hf",
    (
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.position_embeddings", "position_embeddings"),
        Rule("embeddings.patch_embeddings.projection.weight", "patch.kernel", CONV),
        Rule("embeddings.patch_embeddings.projection.bias", "patch.bias"),
        *_norm("encoder.layer.{i}.layernorm_before", "blocks.{i}.norm1"),
        *_dense("encoder.layer.{i}.attention.attention.query", "blocks.{i}.attn.query"),
        *_dense("encoder.layer.{i}.attention.attention.key", "blocks.{i}.attn.key"),
        *_dense("encoder.layer.{i}.attention.attention.value", "blocks.{i}.attn.value"),
        *_dense("encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.out"),
        *_norm("encoder.layer.{i}.layernorm_after", "blocks.{i}.norm2"),
        *_dense("encoder.layer.{i}.intermediate.dense", "blocks.{i}.mlp.fc1"),
        *_dense("encoder.layer.{i}.output.dense", "blocks.{i}.mlp.fc2"),
        *_norm("layernorm", "norm"),
        *_dense("pooler.dense", "pooler"),
        *_dense("classifier", "head"),
    ),
    prefix="vit.",
)

# The module names of transformers 5 (its `state_dict()`).
HF5 = Layout(
    "hf5",
    (
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.position_embeddings", "position_embeddings"),
        Rule("embeddings.patch_embeddings.projection.weight", "patch.kernel", CONV),
        Rule("embeddings.patch_embeddings.projection.bias", "patch.bias"),
        *_norm("layers.{i}.layernorm_before", "blocks.{i}.norm1"),
        *_dense("layers.{i}.attention.q_proj", "blocks.{i}.attn.query"),
        *_dense("layers.{i}.attention.k_proj", "blocks.{i}.attn.key"),
        *_dense("layers.{i}.attention.v_proj", "blocks.{i}.attn.value"),
        *_dense("layers.{i}.attention.o_proj", "blocks.{i}.attn.out"),
        *_norm("layers.{i}.layernorm_after", "blocks.{i}.norm2"),
        *_dense("layers.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *_dense("layers.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        *_norm("layernorm", "norm"),
        *_dense("pooler.dense", "pooler"),
        *_dense("classifier", "head"),
    ),
    prefix="vit.",
)

# FlaxViT's parameter tree, as it stands in flax_model.msgpack. Kernels are flax's already.
FLAX = Layout(
    "flax",
    (
        Rule("embeddings/cls_token", "cls_token"),
        Rule("embeddings/position_embeddings", "position_embeddings"),
        *_linen_dense("embeddings/patch_embeddings/projection", "patch"),
        *_linen_norm("encoder/layer/{i}/layernorm_before", "blocks.{i}.norm1"),
        *_linen_dense("encoder/layer/{i}/attention/attention/query", "blocks.{i}.attn.query"),
        *_linen_dense("encoder/layer/{i}/attention/attention/key", "blocks.{i}.attn.key"),
        *_linen_dense("encoder/layer/{i}/attention/attention/value", "blocks.{i}.attn.value"),
        *_linen_dense("encoder/layer/{i}/attention/output/dense", "blocks.{i}.attn.out"),
        *_linen_norm("encoder/layer/{i}/layernorm_after", "blocks.{i}.norm2"),
        *_linen_dense("encoder/layer/{i}/intermediate/dense", "blocks.{i}.mlp.fc1"),
        *_linen_dense("encoder/layer/{i}/output/dense", "blocks.{i}.mlp.fc2"),
        *_linen_norm("layernorm", "norm"),
        *_linen_dense("pooler/dense", "pooler"),
        *_linen_dense("classifier", "head"),
    ),
    prefix="vit/",
)


def _google(name: str, positions: Rule, norm2: str, attention: str, mlp: str) -> Layout:
    """What the two ViTs of Google's have in common: linen numbers an unnamed module by its place or by its kind."""
    block = "Transformer/encoderblock_{i}"
    return Layout(
        name,
        (
            Rule("cls", "cls_token"),
            positions,
            *_linen_dense("embedding", "patch"),
            *_linen_norm(f"{block}/LayerNorm_0", "blocks.{i}.norm1"),
            *_linen_dense(f"{block}/{attention}/query", "blocks.{i}.attn.query", HEADS_KERNEL, HEADS_BIAS),
            *_linen_dense(f"{block}/{attention}/key", "blocks.{i}.attn.key", HEADS_KERNEL, HEADS_BIAS),
            *_linen_dense(f"{block}/{attention}/value", "blocks.{i}.attn.value", HEADS_KERNEL, HEADS_BIAS),
            *_linen_dense(f"{block}/{attention}/out", "blocks.{i}.attn.out", HEADS_OUT),
            *_linen_norm(f"{block}/{norm2}", "blocks.{i}.norm2"),
            *_linen_dense(f"{block}/{mlp}/Dense_0", "blocks.{i}.mlp.fc1"),
            *_linen_dense(f"{block}/{mlp}/Dense_1", "blocks.{i}.mlp.fc2"),
            *_linen_norm("Transformer/encoder_norm", "norm"),
            # Both put a tanh after this dense layer of the cls token: the reference's pooler.
            *_linen_dense("pre_logits", "pooler"),
            *_linen_dense("head", "head"),
        ),
        head="head",
    )


# The .npz files of google-research/vision_transformer (names: vit_jax/models_vit.py).
NPZ = _google(
    "npz",
    positions=Rule("Transformer/posembed_input/pos_embedding", "position_embeddings"),
    norm2="LayerNorm_2",
    attention="MultiHeadDotProductAttention_1",
    mlp="MlpBlock_3",
)

# google-research/big_vision with pool_type="tok" (names, and where positions are added: big_vision/models/vit.py).
BIG_VISION = _google(
    "big_vision",
    positions=Rule("pos_embedding", "position_embeddings", GRID_POSITIONS),
    norm2="LayerNorm_1",
    attention="MultiHeadDotProductAttention_0",
    mlp="MlpBlock_0",
)

# timm's VisionTransformer (names: timm/models/vision_transformer.py). One dense layer makes query, key and value, in
# this order: `qkv(x).reshape(B, N, 3, heads, head_dim)` (timm/layers/attention.py). It has no pooler.
TIMM = Layout(
    "timm",
    (
        Rule("cls_token", "cls_token"),
        Rule("pos_embed", "position_embeddings"),
        Rule("patch_embed.proj.weight", "patch.kernel", CONV),
        Rule("patch_embed.proj.bias", "patch.bias"),
        *_norm("blocks.{i}.norm1", "blocks.{i}.norm1"),
        *(
            rule._replace(part=part, parts=3)
            for part, role in enumerate(("query", "key", "value"))
            for rule in _dense("blocks.{i}.attn.qkv", f"blocks.{{i}}.attn.{role}")
        ),
        *_dense("blocks.{i}.attn.proj", "blocks.{i}.attn.out"),
        *_norm("blocks.{i}.norm2", "blocks.{i}.norm2"),
        *_dense("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *_dense("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        *_norm("norm", "norm"),
        *_dense("head", "head"),
    ),
    head="head",
)

LAYOUTS = {layout.name: layout for layout in (HF, HF5, FLAX, NPZ, BIG_VISION, TIMM)}


@lru_cache(maxsize=64)
def list_parameters(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's path and shape, in the model's order, found without allocating any."""
    _, shapes = skeleton(config)
    return {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(shapes)}


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
      Parameters by path, as many and as shaped as `parameter_shapes(config)`; dtypes and bits are the source's.

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
