"""The weight map: one table of rules per checkpoint layout, applied and inverted under a completeness check.

A rule is one line, a source name <-> a destination path with an invertible transform; `{i}` stands for the block's
number. Every destination is written exactly once and every source tensor is consumed exactly once, unless the caller
names it as exempt; `PortError` lists every fault at once. Values are moved, never computed with: each tensor keeps its
bits and its dtype.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.errors import InputError
from vit_ref.model import VisionTransformer

Tensors = Mapping[str, NDArray]
_WEIGHT_DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


class Fault(NamedTuple):
    """One fault of a port: its kind, the tensor's name in the source, and what is wrong with it."""

    kind: str
    name: str
    detail: str


class PortError(InputError):
    """Weights that do not fit the configuration. `faults` has every one of them, `str()` lists them by kind."""

    def __init__(self, faults: Iterable[Fault], layout: str):
        self.faults = tuple(faults)
        counts = Counter(fault.kind for fault in self.faults)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines = [f"the weights do not fit the configuration (layout {layout}): {summary}"]
        lines += [f"  {fault.kind}: {fault.name}: {fault.detail}" for fault in self.faults]
        super().__init__("\n".join(lines))


class Transform(NamedTuple):
    """How a source tensor becomes a parameter, and back. Both directions only move elements."""

    to_parameter: Callable[[NDArray, ViTConfig], NDArray]
    to_source: Callable[[NDArray, ViTConfig], NDArray]


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


class Rule(NamedTuple):
    """One line of the weight map."""

    source: str
    destination: str
    transform: Transform = SAME


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
        """The rules of one configuration, blocks counted out, in the order of the model's parameters."""
        bound = []
        for destination in parameter_shapes(config):
            template, block = _templated(destination)
            rule = next((rule for rule in self.rules if rule.destination == template), None)
            if rule is None:
                raise LookupError(f"layout {self.name} has no rule for {destination}")
            source = rule.source.replace("{i}", block)
            if prefixed and not source.startswith(self.head):
                source = self.prefix + source
            bound.append(Rule(source, destination, rule.transform))
        return tuple(bound)

    def recognises(self, names: Iterable[str]) -> int:
        """How many of `names` could be this layout's, whatever the configuration."""
        known = {rule.source for rule in self.rules}
        return sum(_templated(name.removeprefix(self.prefix))[0] in known for name in names)


def _templated(name: str) -> tuple[str, str]:
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
        Rule("embeddings/patch_embeddings/projection/kernel", "patch.kernel"),
        Rule("embeddings/patch_embeddings/projection/bias", "patch.bias"),
        Rule("encoder/layer/{i}/layernorm_before/scale", "blocks.{i}.norm1.scale"),
        Rule("encoder/layer/{i}/layernorm_before/bias", "blocks.{i}.norm1.bias"),
        Rule("encoder/layer/{i}/attention/attention/query/kernel", "blocks.{i}.attn.query.kernel"),
        Rule("encoder/layer/{i}/attention/attention/query/bias", "blocks.{i}.attn.query.bias"),
        Rule("encoder/layer/{i}/attention/attention/key/kernel", "blocks.{i}.attn.key.kernel"),
        Rule("encoder/layer/{i}/attention/attention/key/bias", "blocks.{i}.attn.key.bias"),
        Rule("encoder/layer/{i}/attention/attention/value/kernel", "blocks.{i}.attn.value.kernel"),
        Rule("encoder/layer/{i}/attention/attention/value/bias", "blocks.{i}.attn.value.bias"),
        Rule("encoder/layer/{i}/attention/output/dense/kernel", "blocks.{i}.attn.out.kernel"),
        Rule("encoder/layer/{i}/attention/output/dense/bias", "blocks.{i}.attn.out.bias"),
        Rule("encoder/layer/{i}/layernorm_after/scale", "blocks.{i}.norm2.scale"),
        Rule("encoder/layer/{i}/layernorm_after/bias", "blocks.{i}.norm2.bias"),
        Rule("encoder/layer/{i}/intermediate/dense/kernel", "blocks.{i}.mlp.fc1.kernel"),
        Rule("encoder/layer/{i}/intermediate/dense/bias", "blocks.{i}.mlp.fc1.bias"),
        Rule("encoder/layer/{i}/output/dense/kernel", "blocks.{i}.mlp.fc2.kernel"),
        Rule("encoder/layer/{i}/output/dense/bias", "blocks.{i}.mlp.fc2.bias"),
        Rule("layernorm/scale", "norm.scale"),
        Rule("layernorm/bias", "norm.bias"),
        Rule("pooler/dense/kernel", "pooler.kernel"),
        Rule("pooler/dense/bias", "pooler.bias"),
        Rule("classifier/kernel", "head.kernel"),
        Rule("classifier/bias", "head.bias"),
    ),
    prefix="vit/",
)

# The .npz files of google-research/vision_transformer (names: vit_jax/models_vit.py). Its pre-logits layer is the
# reference's pooler.
NPZ = Layout(
    "npz",
    (
        Rule("cls", "cls_token"),
        Rule("Transformer/posembed_input/pos_embedding", "position_embeddings"),
        Rule("embedding/kernel", "patch.kernel"),
        Rule("embedding/bias", "patch.bias"),
        *(
            rule
            for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2"))
            for rule in (
                Rule(f"Transformer/encoderblock_{{i}}/{theirs}/scale", f"blocks.{{i}}.{ours}.scale"),
                Rule(f"Transformer/encoderblock_{{i}}/{theirs}/bias", f"blocks.{{i}}.{ours}.bias"),
            )
        ),
        *(
            rule
            for name in ("query", "key", "value")
            for source in (f"Transformer/encoderblock_{{i}}/MultiHeadDotProductAttention_1/{name}",)
            for rule in (
                Rule(f"{source}/kernel", f"blocks.{{i}}.attn.{name}.kernel", HEADS_KERNEL),
                Rule(f"{source}/bias", f"blocks.{{i}}.attn.{name}.bias", HEADS_BIAS),
            )
        ),
        Rule(
            "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/out/kernel",
            "blocks.{i}.attn.out.kernel",
            HEADS_OUT,
        ),
        Rule("Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/out/bias", "blocks.{i}.attn.out.bias"),
        *(
            Rule(f"Transformer/encoderblock_{{i}}/MlpBlock_3/{theirs}/{leaf}", f"blocks.{{i}}.mlp.{ours}.{leaf}")
            for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1"))
            for leaf in ("kernel", "bias")
        ),
        Rule("Transformer/encoder_norm/scale", "norm.scale"),
        Rule("Transformer/encoder_norm/bias", "norm.bias"),
        Rule("pre_logits/kernel", "pooler.kernel"),
        Rule("pre_logits/bias", "pooler.bias"),
        Rule("head/kernel", "head.kernel"),
        Rule("head/bias", "head.bias"),
    ),
    head="head",
)

LAYOUTS = {layout.name: layout for layout in (HF, HF5, FLAX, NPZ)}


@lru_cache(maxsize=64)
def parameter_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's path and shape, in the model's order, found without allocating any."""
    state = nnx.state(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    return {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}


def detect(names: Iterable[str]) -> Layout:
    """The layout that recognises most of `names`.

    Raises:
      PortError: none recognises any.
    """
    names = tuple(names)
    scores = {layout.name: layout.recognises(names) for layout in LAYOUTS.values()}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        shown = ", ".join(sorted(names)[:3]) or "none at all"
        raise PortError(
            [Fault("unrecognised", "all tensors", f"no known layout ({', '.join(LAYOUTS)}) has such names: {shown}")],
            "unknown",
        )
    return LAYOUTS[best]


def port(source: Tensors, config: ViTConfig, layout: Layout, *, exempt: Iterable[str] = ()) -> dict[str, NDArray]:
    """Applies a layout's rules.

    Args:
      source: tensors by their names in the layout.
      config: the model to fill.
      layout: the names' layout; `detect` finds it.
      exempt: names or patterns (`*`, `?`) of source tensors to leave behind on purpose.

    Returns:
      Parameters by path, as many and as shaped as `parameter_shapes(config)`; dtypes and bits are the source's.

    Raises:
      PortError: with every missing, unexpected, misshapen and non-finite tensor, every one that is not floating point,
        and every exemption that names nothing.
    """
    rules = layout.bind(config, prefixed=is_prefixed(source, layout))
    shapes = parameter_shapes(config)
    faults = []
    parameters = {}
    for rule in rules:
        shape = _source_shape(rule, shapes[rule.destination], config)
        if rule.source not in source:
            faults.append(Fault("missing", rule.source, f"expected {shape} for {rule.destination}"))
            continue
        tensor = np.asarray(source[rule.source])
        if tensor.shape != shape:
            detail = f"expected {shape} for {rule.destination}, found {tensor.shape}"
            faults.append(Fault("misshapen", rule.source, detail))
        elif tensor.dtype not in _WEIGHT_DTYPES:
            faults.append(Fault("not floating point", rule.source, f"dtype {tensor.dtype}"))
        elif (where := _first_not_finite(tensor)) is not None:
            faults.append(Fault("not finite", rule.source, f"{tensor[where]} at {where}"))
        else:
            parameters[rule.destination] = np.ascontiguousarray(rule.transform.to_parameter(tensor, config))
    exempt = tuple(exempt)
    left_over = source.keys() - {rule.source for rule in rules}
    faults += [
        Fault("unexpected", name, f"shape {np.shape(source[name])}, no rule takes it")
        for name in sorted(left_over)
        if not any(fnmatchcase(name, pattern) for pattern in exempt)
    ]
    faults += [
        Fault("stale exemption", pattern, "matches no tensor that would be left over")
        for pattern in exempt
        if not any(fnmatchcase(name, pattern) for name in left_over)
    ]
    if faults:
        raise PortError(faults, layout.name)
    return parameters


def export(parameters: Tensors, config: ViTConfig, layout: Layout) -> dict[str, NDArray]:
    """Inverts a layout's rules: `export(port(source)) == source`, bit for bit.

    Args:
      parameters: by path, as `port` returns them.
      config: the model's configuration.
      layout: the layout to write.

    Returns:
      Tensors by their names in the layout. A classifier's carry the layout's prefix, a headless model's do not.
    """
    return {
        rule.source: np.ascontiguousarray(rule.transform.to_source(np.asarray(parameters[rule.destination]), config))
        for rule in layout.bind(config, prefixed=bool(config.num_labels))
    }


def is_prefixed(names: Iterable[str], layout: Layout) -> bool:
    """Whether these names carry the layout's prefix: most of the body's do."""
    body = [name for name in names if not name.startswith(layout.head)]
    return 2 * sum(name.startswith(layout.prefix) for name in body) > len(body)


def _first_not_finite(tensor: NDArray) -> tuple[int, ...] | None:
    # A signalling NaN in half precision would make numpy warn that it met one, which is what is asked.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(tensor)
    return None if finite.all() else tuple(int(k) for k in np.argwhere(~finite)[0])


def _source_shape(rule: Rule, shape: tuple[int, ...], config: ViTConfig) -> tuple[int, ...]:
    # One byte broadcast to the shape: the transform itself says what shape it comes from.
    return rule.transform.to_source(np.broadcast_to(np.zeros((), np.int8), shape), config).shape
