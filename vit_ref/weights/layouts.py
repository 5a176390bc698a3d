"""The layouts: a table for each kind of checkpoint that says which tensor is which parameter.

A rule is one line: a name in the source, a path in the model, and an invertible transform. `{i}` stands for the block's
number. Rules only move values, so each tensor keeps its bits and its dtype. `mapping` applies the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import Fault, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters


class Transform(NamedTuple):
    """Transform of a source tensor into a parameter, and back. Both directions move elements, or add and drop zeros.

    Attributes:
      to_parameter: (source tensor, config) -> parameter.
      to_source: (parameter, config) -> source tensor.
      unfit: returns what the layout cannot store of a parameter, or "" if it can store all.
    """

    to_parameter: Callable[[NDArray, ViTConfig], NDArray]
    to_source: Callable[[NDArray, ViTConfig], NDArray]
    unfit: Callable[[NDArray], str] = lambda x: ""


SAME = Transform(lambda x, c: x, lambda x, c: x)
# PyTorch's Linear has (out, in), flax has (in, out).
LINEAR = Transform(lambda x, c: x.T, lambda x, c: x.T)
# PyTorch's Conv2d has (out, in, height, width), flax has (height, width, in, out).
CONV = Transform(lambda x, c: x.transpose(2, 3, 1, 0), lambda x, c: x.transpose(3, 2, 0, 1))
# flax's attention has an axis of heads: kernel (D, H, K) and bias (H, K) at the input, kernel (H, K, D) at the output.
HEADS_KERNEL = Transform(
    lambda x, c: x.reshape(len(x), -1),
    lambda x, c: x.reshape(len(x), c.num_attention_heads, -1),
)
HEADS_BIAS = Transform(lambda x, c: x.reshape(-1), lambda x, c: x.reshape(c.num_attention_heads, -1))
HEADS_OUT = Transform(
    lambda x, c: x.reshape(-1, x.shape[-1]),
    lambda x, c: x.reshape(c.num_attention_heads, -1, x.shape[-1]),
)
# big_vision adds positions before it prepends the cls token, so the cls token's position is zero. Another value, or a
# negative zero, could not be read back.
GRID_POSITIONS = Transform(
    lambda x, c: np.concatenate([np.zeros_like(x[:, :1]), x], axis=1),
    lambda x, c: x[:, 1:],
    lambda x: "the cls token's position is not zero" if x[:, 0].tobytes().strip(b"\0") else "",
)


class Rule(NamedTuple):
    """One line of the weight map.

    Attributes:
      source: name of the tensor in the layout.
      destination: path of the parameter in the model.
      transform: transform between the two.
      part: if several rules share a source, the number of this rule's part, along the first axis.
      parts: number of such parts, all of one size.
    """

    source: str
    destination: str
    transform: Transform = SAME
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to name and shape the weights of a ViT.

    Attributes:
      name: name in messages.
      rules: the weight map, with `{i}` for the block's number.
      prefix: prefix of every name but the head's in a classifier's checkpoint. A headless checkpoint has no prefix.
      head: beginning of the head's names, which never have the prefix.
    """

    name: str
    rules: tuple[Rule, ...]
    prefix: str = ""
    head: str = "classifier"

    def bind(self, config: ViTConfig, prefixed: bool) -> tuple[Rule, ...]:
        """Returns the rules for one configuration, with the numbers of the blocks, in the order of the parameters.

        Args:
          config: the model's configuration.
          prefixed: whether the names have the layout's prefix.

        Raises:
          MappingError: the layout has no name for a parameter, as timm's has none for a pooler.
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
        """Counts the names that could belong to this layout, whatever the configuration."""
        known = {rule.source for rule in self.rules}
        return sum(split_block_number(name.removeprefix(self.prefix))[0] in known for name in names)


def split_block_number(name: str) -> tuple[str, str]:
    """Returns a name with `{i}` for its block number, and that number, or "" if there is none."""
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


# Hugging Face's PyTorch names up to transformers 4. transformers 5 still writes them.
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

# The module names of transformers 5, as in its `state_dict()`.
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

# FlaxViT's parameter tree, as in flax_model.msgpack. The kernels have flax's shapes already.
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
    """Builds the layout of one of Google's two ViTs. They differ in the numbers that linen gives unnamed modules."""
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
            # Both apply a tanh after this dense layer of the cls token, as the reference's pooler does.
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

# google-research/big_vision with pool_type="tok" (names, and the place of the positions: big_vision/models/vit.py).
BIG_VISION = _google(
    "big_vision",
    positions=Rule("pos_embedding", "position_embeddings", GRID_POSITIONS),
    norm2="LayerNorm_1",
    attention="MultiHeadDotProductAttention_0",
    mlp="MlpBlock_0",
)

# timm's VisionTransformer (names: timm/models/vision_transformer.py). One dense layer makes query, key and value in
# this
# order: `qkv(x).reshape(B, N, 3, heads, head_dim)` (timm/layers/attention.py). It has no pooler.
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
