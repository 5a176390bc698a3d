"""Does a rule give the sharding of each parameter, and is an impossible division refused?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import vit_ref
from tests.sharding.ways import CASE
from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.weights.layouts import split_block_number
from vit_ref.weights.partition import RULES, choose_shardings

# ViT-B/16 on two axes as in the papers: columns are the second dimension of a kernel. All others are whole.
COLUMNS = ("attn.query", "attn.key", "attn.value", "mlp.fc1")
ROWS = ("attn.out", "mlp.fc2")
WIDTH = {"position_embeddings": P(None, None, "data"), "patch.kernel": P(None, None, None, "data")}
TENSOR = {
    **{f"{layer}.kernel": P(None, "model") for layer in COLUMNS},
    **{f"{layer}.bias": P("model") for layer in COLUMNS},
    **{f"{layer}.kernel": P("model", None) for layer in ROWS},
}
FSDP = {
    **{f"{layer}.kernel": P("data", None) for layer in COLUMNS},
    **{f"{layer}.kernel": P(None, "data") for layer in ROWS},
    **WIDTH,
    "head.kernel": P("data"),
}
BOTH = {
    **{f"{layer}.kernel": P("data", "model") for layer in COLUMNS},
    **{f"{layer}.bias": P("model") for layer in COLUMNS},
    **{f"{layer}.kernel": P("model", "data") for layer in ROWS},
    **WIDTH,
    "head.kernel": P("data"),
}
BASE = ViTConfig.variant("B/16")


def mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize(
    ("kind", "expected"), [("data", {}), ("tensor", TENSOR), ("fsdp", FSDP), ("fsdp+tensor", BOTH)]
)
def test_parameters_of_vit_b16_are_divided_as_published(kind: str, expected: dict[str, P]) -> None:
    found = {path: where.spec for path, where in choose_shardings(BASE, mesh(data=2, model=4), kind).items()}
    assert list(found) == list(list_parameters(BASE))
    divided = {path: spec for path, spec in found.items() if any(spec)}
    assert divided == {path: expected[path.split(".", 2)[-1] if "blocks" in path else path] for path in divided}
    assert {path.split(".", 2)[-1] if "blocks" in path else path for path in divided} == expected.keys()


@pytest.mark.parametrize("kind", RULES)
def test_each_rule_is_some_parameters_and_each_parameter_has_one(kind: str) -> None:
    headless = replace(CASE.config, num_labels=0, pooler=True)
    assert {
        split_block_number(path)[0] for config in (CASE.config, headless) for path in list_parameters(config)
    } == set(RULES[kind])


@pytest.mark.parametrize(("width", "divided"), [(56, 0), (64, 4)])
def test_small_parameters_are_whole_and_need_not_be_divisible(width: int, divided: int) -> None:
    # 64 x 64 elements are enough, in query, key, value and out. 56 is no multiple of 5, which does not matter here.
    config = replace(CASE.config, hidden_size=width, intermediate_size=57)
    found = choose_shardings(config, mesh(data=8 if divided else 5), "fsdp")
    assert sum(any(where.spec) for where in found.values()) == divided


def refusal(config: ViTConfig, on: AbstractMesh, sharding: object) -> str:
    with pytest.raises(InputError) as caught:
        choose_shardings(config, on, sharding)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "on", "sharding", "message"),
    [
        # Eight devices divide 768 columns, but not twelve heads.
        (
            BASE,
            mesh(model=8),
            "tensor",
            "blocks.0.attn.key.bias: dimension 0 (12 heads, 768 columns or rows) cannot be",
        ),
        (BASE, mesh(data=5), "fsdp", "blocks.0.attn.key.kernel: dimension 0 (length 768) cannot be divided over the 5"),
        (
            replace(BASE, intermediate_size=3073),
            mesh(data=2, model=4),
            "fsdp+tensor",
            "blocks.0.mlp.fc1.bias: dimension 0 (length 3073) cannot be divided over the 4 devices of the axis 'model'",
        ),
        (BASE, mesh(data=4), "tensor", "its rule uses the axis 'model', and the mesh has only 'data'"),
        (BASE, mesh(data=4), "zero", "sharding is 'zero': give one of data, fsdp, tensor, fsdp+tensor"),
        (BASE, mesh(data=4), {}, "blocks.0.attn.key.bias: it has no rule: add one for 'blocks.{i}.attn"),
        (
            BASE,
            mesh(x=2),
            {**RULES["data"], "norm.bias": P(None, "x")},
            "norm.bias: the rule (None, 'x') has more dimensions than the shape (768,): give at most 1",
        ),
        (
            BASE,
            mesh(x=3, y=5),
            {**RULES["data"], "head.kernel": P(("x", "y"))},
            "head.kernel: dimension 0 (length 768) cannot be divided over the 15 devices of the axis 'x+y'",
        ),
        (
            BASE,
            mesh(x=2),
            {**RULES["data"], "head.kernel": P("x", "x")},
            "head.kernel: the rule ('x', 'x') uses an axis more than once: use each at most once",
        ),
        (
            BASE,
            mesh(x=2),
            {**RULES["data"], "blocks.{i}.typo": P("x")},
            "blocks.{i}.typo: no model has a parameter of this name: use the names in partition.RULES",
        ),
        (
            BASE,
            AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,)),
            "data",
            "the mesh's axes are Explicit, and this package leaves the division to the compiler: give"
            " jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * 1)",
        ),
        (
            BASE,
            AbstractMesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Manual)),
            "data",
            "the mesh's axes are Manual, and this package leaves the division to the compiler: give"
            " jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * 2)",
        ),
        (
            BASE,
            mesh(data=2),
            None,
            "sharding is None: give one of data, fsdp, tensor, fsdp+tensor, or rules of your own",
        ),
        (
            BASE,
            mesh(data=2),
            {**RULES["data"], "norm.bias": None},
            "norm.bias: its rule is None: give a jax.sharding.PartitionSpec, an empty one for none",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    config: ViTConfig, on: AbstractMesh, sharding: object, message: str
) -> None:
    assert message in refusal(config, on, sharding)


def test_rules_of_ones_own_are_followed_to_the_letter() -> None:
    rules = {**RULES["data"], "norm.bias": P("x"), "head.kernel": P(("x", "y"))}
    found = choose_shardings(BASE, mesh(x=2, y=4), rules)
    assert {path: where.spec for path, where in found.items() if any(where.spec)} == {
        "norm.bias": P("x"),
        "head.kernel": P(("x", "y")),
    }


def test_a_sharding_wants_a_mesh() -> None:
    with pytest.raises(InputError, match=r"^mesh is of type AbstractMesh, which has no devices: give"):
        vit_ref.from_pretrained("anywhere", mesh=mesh(data=2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sharding is 'tensor' and mesh is None: give the mesh, too"):
        vit_ref.from_pretrained("anywhere", sharding="tensor")
