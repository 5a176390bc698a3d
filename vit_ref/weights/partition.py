"""Partition of parameters on a `jax.sharding` mesh: a table with one line a parameter. The compiler does the rest.

Tensor parallelism is Megatron's (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3). Query, key, value
and fc1 are divided by columns, that is by heads and hidden units, and out and fc2 by rows. So the forward pass of a
block communicates twice, with one sum over the devices after each pair. FSDP (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277) divides every large parameter along the width of the token stream, and gathers it for
use. Both divide the batch over the axis "data".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P  # as jax's own documentation calls it

from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.weights.layouts import split_block_number

Kind = Literal["data", "fsdp", "tensor", "fsdp+tensor"]
Rules = Mapping[str, P]

DATA, MODEL = "data", "model"

# Path, with `{i}` for the block's number -> the axis of the mesh that divides each dimension. Nothing else is ever
# divided. Kernels are (in, out).
_ALL: Rules = {
    "cls_token": P(None, None, DATA),
    "position_embeddings": P(None, None, DATA),
    "patch.kernel": P(None, None, None, DATA),
    "patch.bias": P(DATA),
    "blocks.{i}.norm1.scale": P(DATA),
    "blocks.{i}.norm1.bias": P(DATA),
    "blocks.{i}.attn.query.kernel": P(DATA, MODEL),
    "blocks.{i}.attn.query.bias": P(MODEL),
    "blocks.{i}.attn.key.kernel": P(DATA, MODEL),
    "blocks.{i}.attn.key.bias": P(MODEL),
    "blocks.{i}.attn.value.kernel": P(DATA, MODEL),
    "blocks.{i}.attn.value.bias": P(MODEL),
    "blocks.{i}.attn.out.kernel": P(MODEL, DATA),
    "blocks.{i}.attn.out.bias": P(DATA),
    "blocks.{i}.norm2.scale": P(DATA),
    "blocks.{i}.norm2.bias": P(DATA),
    "blocks.{i}.mlp.fc1.kernel": P(DATA, MODEL),
    "blocks.{i}.mlp.fc1.bias": P(MODEL),
    "blocks.{i}.mlp.fc2.kernel": P(MODEL, DATA),
    "blocks.{i}.mlp.fc2.bias": P(DATA),
    "norm.scale": P(DATA),
    "norm.bias": P(DATA),
    "pooler.kernel": P(DATA),
    "pooler.bias": P(),
    "head.kernel": P(DATA),
    "head.bias": P(),
}


def _along(*axes: str) -> Rules:
    return {path: P(*(axis if axis in axes else None for axis in spec)) for path, spec in _ALL.items()}


# With "data" every device has all parameters.
RULES: dict[Kind, Rules] = {
    "data": _along(),
    "fsdp": _along(DATA),
    "tensor": _along(MODEL),
    "fsdp+tensor": _along(DATA, MODEL),
}
# To gather a smaller parameter over "data" costs more than to keep it whole: biases, norms and heads of a few classes.
LEAST = 2**12


def choose_shardings(
    config: ViTConfig, mesh: Mesh | AbstractMesh, sharding: Kind | Rules, *, lenient: bool = False
) -> dict[str, NamedSharding]:
    """Chooses the sharding of each parameter of a model.

    Args:
      config: the model's configuration.
      mesh: a mesh with axes "data" and "model". An axis that no rule uses may be missing.
      sharding: a key of `RULES`, which does not divide parameters of fewer than `LEAST` elements over "data". Or the
        caller's own rules: a specification for each parameter's path, with `{i}` for the block's number.
      lenient: whether to leave a dimension whole if the axis does not divide it.

    Returns:
      Path -> sharding, in the model's order.

    Raises:
      InputError: a rule is missing, unknown, no specification, or uses an axis twice. Or the mesh lacks an axis, or its
        axes are not of type Auto. Or a dimension cannot be divided evenly; the heads of attention count whole.
    """
    if others := [kind for kind in mesh.axis_types if kind != AxisType.Auto]:
        raise InputError(
            f"the mesh's axes are {others[0].name}, and this package leaves the division to the compiler: give"
            f" jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
        )
    if isinstance(sharding, str) and sharding not in RULES:
        raise InputError(f"sharding is {sharding!r}: give one of {', '.join(RULES)}, or rules of your own")
    if not isinstance(sharding, str | Mapping):
        raise InputError(f"sharding is {sharding!r}: give one of {', '.join(RULES)}, or rules of your own by path")
    rules = RULES[sharding] if isinstance(sharding, str) else sharding
    if unknown := [path for path in rules if path not in _ALL]:
        raise InputError(f"{unknown[0]}: no model has a parameter of this name: use the names in partition.RULES")
    shardings = {}
    for path, shape in list_parameters(config).items():
        template = split_block_number(path)[0]
        if template not in rules:
            raise InputError(f"{path}: it has no rule: add one for {template!r}")
        spec = rules[template]
        if not isinstance(spec, P):
            raise InputError(f"{path}: its rule is {spec!r}: give a jax.sharding.PartitionSpec, an empty one for none")
        if len(spec) > len(shape):
            raise InputError(
                f"{path}: the rule {tuple(spec)} has more dimensions than the shape {shape}: give at most {len(shape)}"
            )
        axes = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
        if len(set(axes)) < len(axes):
            raise InputError(f"{path}: the rule {tuple(spec)} uses an axis more than once: use each at most once")
        if isinstance(sharding, str) and math.prod(shape) < LEAST:
            spec = P(*(None if axis == DATA else axis for axis in spec))
        fitting = [
            axis if _divides(axis, dimension, path, config, mesh, lenient) else None
            for dimension, axis in enumerate(spec)
        ]
        shardings[path] = NamedSharding(mesh, P(*fitting))
    return shardings


def _divides(
    axis: str | tuple[str, ...] | None,
    dimension: int,
    path: str,
    config: ViTConfig,
    mesh: Mesh | AbstractMesh,
    lenient: bool,
) -> bool:
    """Tells whether an axis of the mesh can divide a dimension of a parameter."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    if missing := [name for name in names if name not in mesh.shape]:
        raise InputError(
            f"{path}: its rule uses the axis {missing[0]!r}, and the mesh has only"
            f" {', '.join(map(repr, mesh.axis_names))}: give a mesh with that axis"
        )
    length, devices = list_parameters(config)[path][dimension], math.prod(mesh.shape[name] for name in names)
    template = split_block_number(path)[0]
    # In attention Megatron divides heads, and half a head cannot attend.
    heads = ".attn." in template and _ALL[template][dimension] == MODEL
    if (config.num_attention_heads if heads else length) % devices == 0:
        return True
    if lenient:
        return False
    what = f"{config.num_attention_heads} heads, {length} columns or rows" if heads else f"length {length}"
    raise InputError(
        f"{path}: dimension {dimension} ({what}) cannot be divided over the {devices} devices of the axis"
        f" {'+'.join(names)!r}: give a mesh whose axis divides it"
    )
