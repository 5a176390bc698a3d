"""Is the weight map complete and invertible, and does it report every fault by name?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.vit_strategies import random_bits, with_room, within
from vit_ref.errors import Fault, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.vit import hf_tensors
from vit_ref.weights import layouts, mapping
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.layouts import LAYOUTS, Layout
from vit_ref.weights.pretrained import get_parameters

# Square dimensions, so that a transposed kernel has the right shape. At least eleven blocks, so that numeric and
# lexicographic order differ.
CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=2,
    num_hidden_layers=12,
    intermediate_size=6,
    image_size=8,
    patch_size=4,
    num_channels=4,
    num_labels=6,
)
HEADLESS = ViTConfig(**{**CONFIG.__dict__, "num_labels": 0, "pooler": True, "pooler_output_size": 5})


def exported(layout: Layout, config: ViTConfig) -> dict[str, NDArray]:
    """Returns `parameters` in a layout, as far as it can store them."""
    return mapping.export(with_room(layout, parameters(config)), config, layout)


def parameters(config: ViTConfig, dtype: type = np.float32) -> dict[str, NDArray]:
    """Returns parameters in which every element is another number, exactly representable in float32."""
    values, start = {}, 0
    for path, shape in list_parameters(config).items():
        size = int(np.prod(shape))
        values[path] = np.arange(start, start + size).reshape(shape).astype(dtype)
        start += size
    return values


each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
configs = pytest.mark.parametrize("config", [CONFIG, HEADLESS], ids=["classifier", "headless"])


@each_layout
@configs
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_port_inverts_export_bit_for_bit(layout: Layout, config: ViTConfig, dtype: type) -> None:
    config = within(layout, config)
    ours = with_room(layout, random_bits(config, dtype))
    source = mapping.export(ours, config, layout)
    # big_vision leaves out the zeros at the position of the cls token.
    left_out = config.hidden_size if layout is layouts.BIG_VISION else 0
    assert sum(value.size for value in source.values()) == sum(value.size for value in ours.values()) - left_out
    assert layout.recognises(source) == len(source)
    assert mapping.detect(source) is layout
    ported = mapping.port(source, config, layout)
    again = mapping.export(ported, config, layout)
    for before, after in ((ours, ported), (source, again)):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name].dtype == dtype
            assert after[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


@each_layout
def test_destinations_are_unique_and_sources_give_every_part(layout: Layout) -> None:
    assert len({rule.destination for rule in layout.rules}) == len(layout.rules)
    parts: dict[str, list[int]] = {}
    for rule in layout.rules:
        parts.setdefault(rule.source, []).append(rule.part)
    for rule in layout.rules:
        assert sorted(parts[rule.source]) == list(range(rule.parts)), rule.source


@each_layout
@configs
def test_every_fault_is_reported_by_name_and_all_at_once(layout: Layout, config: ViTConfig) -> None:
    config = within(layout, config)
    source = exported(layout, config)
    names = sorted(source)
    gone, bent, grown, poisoned, counted = names[3], names[20], names[25], names[30], names[40]
    del source[gone]
    source[bent] = source[bent].reshape(-1)[:-1]
    source[grown] = source[grown].repeat(2, axis=0)
    source[poisoned] = np.where(np.arange(source[poisoned].size).reshape(source[poisoned].shape) == 1, np.nan, 0.0)
    source[counted] = source[counted].astype(np.int32)
    source["something/else.weight"] = np.zeros((2, 3))
    with pytest.raises(MappingError) as caught:
        mapping.port(source, config, layout, ignore=["nothing.*"])
    assert {(fault.kind, fault.name) for fault in caught.value.faults} == {
        ("missing", gone),
        ("misshapen", bent),
        ("misshapen", grown),
        ("not finite", poisoned),
        ("unusable dtype", counted),
        ("unexpected", "something/else.weight"),
        ("stale ignore", "nothing.*"),
    }
    text = str(caught.value)
    summary = text.splitlines()[0]
    assert summary.startswith(f"the weights do not fit the configuration (layout {layout.name}): ")
    assert "2 misshapen" in summary and summary.count("1 ") == 5
    assert all(name in text for name in (gone, bent, poisoned, counted, "something/else.weight", "(2, 3)"))


@each_layout
@configs
def test_any_one_tensor_dropped_renamed_or_reshaped_is_reported(layout: Layout, config: ViTConfig) -> None:
    # The other tests have twelve blocks, for which this one, with every tensor in turn, would take 25 times as long.
    config = dataclasses.replace(within(layout, config), num_hidden_layers=2)
    source = exported(layout, config)
    for name in source:
        rest = {other: value for other, value in source.items() if other != name}
        assert faults(rest, config, layout) == {("missing", name)}
        renamed = {**rest, f"{name}_": source[name]}
        assert faults(renamed, config, layout) == {("missing", name), ("unexpected", f"{name}_")}
        assert faults({**source, f"{name}_": source[name]}, config, layout) == {("unexpected", f"{name}_")}
        assert faults({**source, name: source[name][None]}, config, layout) == {("misshapen", name)}


def faults(source: mapping.Tensors, config: ViTConfig, layout: Layout) -> set[tuple[str, str]]:
    with pytest.raises(MappingError) as caught:
        mapping.port(source, config, layout)
    return {(fault.kind, fault.name) for fault in caught.value.faults}


@each_layout
def test_a_tensor_ignored_by_name_is_left_behind(layout: Layout) -> None:
    extra = {**exported(layout, CONFIG), "mask_token": np.zeros((1, 1, 6), np.float32)}
    ported = mapping.port(extra, CONFIG, layout, ignore=["mask_*"])
    assert all((ported[path] == value).all() for path, value in with_room(layout, parameters(CONFIG)).items())


@each_layout
def test_blocks_beyond_the_configuration_are_unexpected(layout: Layout) -> None:
    deeper = ViTConfig(**{**CONFIG.__dict__, "num_hidden_layers": 13})
    found = faults(exported(layout, deeper), CONFIG, layout)
    # Query, key and value are one layer in timm.
    assert {kind for kind, _ in found} == {"unexpected"} and len(found) == (12 if layout is layouts.TIMM else 16)
    assert all("12" in name for _, name in found)


def test_a_checkpoint_with_half_its_prefix_is_reported() -> None:
    source = mapping.export(parameters(CONFIG), CONFIG, layouts.HF)
    source["layernorm.weight"] = source.pop("vit.layernorm.weight")
    assert faults(source, CONFIG, layouts.HF) == {
        ("missing", "vit.layernorm.weight"),
        ("unexpected", "layernorm.weight"),
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_reference_gets_the_same_tensors_whatever_the_layout(layout: Layout) -> None:
    ported = with_room(layout, parameters(CONFIG))
    source = Checkpoint(Path("any"), mapping.export(ported, CONFIG, layout), CONFIG.to_hf())
    expected, found = mapping.export(ported, CONFIG, layouts.HF), hf_tensors(CONFIG, source)
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }


def test_unknown_names_are_no_layout() -> None:
    with pytest.raises(MappingError, match=r"no known layout .* has such names: conv1.weight, fc.bias"):
        mapping.detect({"fc.bias": np.zeros(1), "conv1.weight": np.zeros(1)})


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["d", "b", "c", "a"], "a, b, c"), (["b", "a"], "a, b"), ([], "there are none")],
)
def test_unknown_names_are_shown_three_at_most(names: list[str], shown: str) -> None:
    with pytest.raises(MappingError, match=f"has such names: {shown}$"):
        mapping.detect(names)


@pytest.mark.parametrize(
    ("carrying", "bare", "expected"),
    [
        (0, 0, False),
        (0, 1, False),
        (1, 0, True),
        (1, 1, False),
        (1, 2, False),
        (2, 1, True),
        (3, 2, True),
        (3, 3, False),
        (3, 4, False),
    ],
)
def test_a_prefix_counts_if_most_names_of_the_body_have_it(carrying: int, bare: int, expected: bool) -> None:
    names = [f"vit.{k}" for k in range(carrying)] + [f"{k}" for k in range(bare)]
    # The number of the head's tensors tells nothing about the prefix.
    assert mapping.is_prefixed([*names, *(f"classifier.{k}" for k in range(9))], layouts.HF) is expected


def test_the_first_non_finite_element_is_reported_with_its_place() -> None:
    source = mapping.export(parameters(CONFIG), CONFIG, layouts.HF)
    kernel = source["classifier.weight"]
    kernel[1, 2], kernel[3, 0], kernel[4, 4] = -np.inf, np.nan, np.inf
    with pytest.raises(MappingError) as caught:
        mapping.port(source, CONFIG, layouts.HF)
    assert caught.value.faults == (Fault("not finite", "classifier.weight", "it has -inf at (1, 2)"),)


@each_layout
def test_a_layout_is_shared_and_cannot_be_changed(layout: Layout) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.prefix = "model."  # type: ignore[misc]


def test_a_layout_without_a_rule_for_a_parameter_is_refused() -> None:
    incomplete = Layout("incomplete", tuple(rule for rule in layouts.HF.rules if rule.destination != "norm.bias"))
    with pytest.raises(
        MappingError, match=r"layout incomplete\): 1 no rule\n  no rule: norm\.bias: the layout has no name"
    ):
        incomplete.bind(CONFIG, prefixed=False)


def test_timm_has_no_pooler() -> None:
    for act in (mapping.port, mapping.export):
        with pytest.raises(MappingError) as caught:
            act(parameters(HEADLESS), HEADLESS, layouts.TIMM)
        found = {(fault.kind, fault.name) for fault in caught.value.faults}
        assert found == {("no rule", "pooler.kernel"), ("no rule", "pooler.bias")}


@pytest.mark.parametrize("position", [1e-45, -0.0])
@pytest.mark.parametrize("element", [0, 5])
def test_big_vision_refuses_a_position_of_the_cls_token(position: float, element: int) -> None:
    ours = with_room(layouts.BIG_VISION, parameters(CONFIG))
    ours["position_embeddings"][0, 0, element] = position
    with pytest.raises(MappingError) as caught:
        mapping.export(ours, CONFIG, layouts.BIG_VISION)
    detail = "the cls token's position is not zero, and pos_embedding cannot store it"
    assert caught.value.faults == (Fault("unfit", "position_embeddings", detail),)


def test_a_port_error_lists_faults_of_one_kind_together() -> None:
    error = MappingError([Fault("missing", "a", "x"), Fault("missing", "b", "y")], "hf")
    assert error.faults[1].name == "b"
    assert str(error).splitlines() == [
        "the weights do not fit the configuration (layout hf): 2 missing",
        "  missing: a: x",
        "  missing: b: y",
    ]


# The destinations of single elements, worked out by hand from each layout's own definition of a layer, and not from the
# rules. PyTorch's Linear is y[o] = sum_i W[o, i] x[i]. Conv2d is y[o] = sum W[o, c, h, w] x[c, h, w]. flax's attention
# is
# q[h, k] = sum_d W[d, h, k] x[d] and y[d] = sum_hk W[h, k, d] z[h, k], with heads flattened head first.
@pytest.mark.parametrize(
    ("layout", "name", "at", "path", "to"),
    [
        ("hf", "vit.encoder.layer.10.attention.attention.query.weight", (4, 1), "blocks.10.attn.query.kernel", (1, 4)),
        ("hf", "vit.encoder.layer.2.attention.attention.key.weight", (0, 5), "blocks.2.attn.key.kernel", (5, 0)),
        ("hf", "vit.encoder.layer.11.intermediate.dense.weight", (2, 3), "blocks.11.mlp.fc1.kernel", (3, 2)),
        ("hf", "vit.encoder.layer.1.output.dense.weight", (2, 3), "blocks.1.mlp.fc2.kernel", (3, 2)),
        ("hf", "vit.encoder.layer.1.attention.output.dense.weight", (2, 3), "blocks.1.attn.out.kernel", (3, 2)),
        ("hf", "vit.encoder.layer.1.layernorm_after.weight", (2,), "blocks.1.norm2.scale", (2,)),
        ("hf", "vit.embeddings.patch_embeddings.projection.weight", (5, 1, 2, 3), "patch.kernel", (2, 3, 1, 5)),
        ("hf", "classifier.weight", (2, 3), "head.kernel", (3, 2)),
        ("hf5", "vit.layers.10.attention.v_proj.weight", (4, 1), "blocks.10.attn.value.kernel", (1, 4)),
        ("hf5", "vit.layers.3.attention.o_proj.weight", (4, 1), "blocks.3.attn.out.kernel", (1, 4)),
        ("hf5", "vit.layers.3.mlp.fc2.weight", (4, 1), "blocks.3.mlp.fc2.kernel", (1, 4)),
        ("flax", "vit/encoder/layer/10/attention/attention/query/kernel", (4, 1), "blocks.10.attn.query.kernel",
         (4, 1)),
        ("flax", "vit/embeddings/patch_embeddings/projection/kernel", (2, 3, 1, 5), "patch.kernel", (2, 3, 1, 5)),
        ("npz", "Transformer/encoderblock_10/MultiHeadDotProductAttention_1/query/kernel", (4, 1, 2),
         "blocks.10.attn.query.kernel", (4, 5)),
        ("npz", "Transformer/encoderblock_2/MultiHeadDotProductAttention_1/value/bias", (1, 0),
         "blocks.2.attn.value.bias", (3,)),
        ("npz", "Transformer/encoderblock_2/MultiHeadDotProductAttention_1/out/kernel", (1, 2, 4),
         "blocks.2.attn.out.kernel", (5, 4)),
        ("npz", "Transformer/encoderblock_2/MlpBlock_3/Dense_0/kernel", (1, 4), "blocks.2.mlp.fc1.kernel", (1, 4)),
        ("npz", "Transformer/encoderblock_2/LayerNorm_2/scale", (4,), "blocks.2.norm2.scale", (4,)),
        ("big_vision", "Transformer/encoderblock_10/MultiHeadDotProductAttention_0/key/kernel", (4, 1, 2),
         "blocks.10.attn.key.kernel", (4, 5)),
        ("big_vision", "Transformer/encoderblock_2/LayerNorm_1/bias", (4,), "blocks.2.norm2.bias", (4,)),
        ("big_vision", "pos_embedding", (0, 0, 3), "position_embeddings", (0, 1, 3)),
        ("timm", "blocks.10.attn.qkv.weight", (0, 2), "blocks.10.attn.query.kernel", (2, 0)),
        ("timm", "blocks.10.attn.qkv.weight", (5, 2), "blocks.10.attn.query.kernel", (2, 5)),
        ("timm", "blocks.10.attn.qkv.weight", (6, 2), "blocks.10.attn.key.kernel", (2, 0)),
        ("timm", "blocks.10.attn.qkv.weight", (17, 2), "blocks.10.attn.value.kernel", (2, 5)),
        ("timm", "blocks.2.attn.qkv.bias", (8,), "blocks.2.attn.key.bias", (2,)),
        ("timm", "blocks.2.attn.proj.weight", (4, 1), "blocks.2.attn.out.kernel", (1, 4)),
        ("timm", "pos_embed", (0, 0, 3), "position_embeddings", (0, 0, 3)),
    ],
)  # fmt: skip
def test_single_elements_land_where_the_layer_says(
    layout: str, name: str, at: tuple[int, ...], path: str, to: tuple[int, ...]
) -> None:
    ours = with_room(LAYOUTS[layout], parameters(CONFIG))
    source = mapping.export(ours, CONFIG, LAYOUTS[layout])
    assert source[name][at] == ours[path][to]
    assert mapping.port(source, CONFIG, LAYOUTS[layout])[path][to] == source[name][at]


def test_npz_attention_computes_what_flax_computes(filled: Callable[..., VisionTransformer]) -> None:
    """Compares flax's MultiHeadDotProductAttention, with the tensors of the .npz, with our attention."""
    from flax import linen

    vit = filled(CONFIG)
    tensors = mapping.export(get_parameters(vit), CONFIG, layouts.NPZ)
    stem = "Transformer/encoderblock_3/MultiHeadDotProductAttention_1"
    params = {
        part: {leaf: tensors[f"{stem}/{part}/{leaf}"] for leaf in ("kernel", "bias")}
        for part in ("query", "key", "value", "out")
    }
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    theirs = linen.MultiHeadDotProductAttention(num_heads=2, deterministic=True).apply({"params": params}, x)
    ours = vit.blocks[3].attn(x, lambda site, value: value, None)
    # Float32, sums of six and of five products: a few units of rounding of values around one.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=16 * 2**-23 * float(jnp.abs(theirs).max()))


def test_names_of_transformers_5() -> None:
    """Uses the names of `ViTForImageClassification(...).state_dict()` in transformers 5.23.0."""
    one_block = ViTConfig(**{**CONFIG.__dict__, "num_hidden_layers": 1})
    assert set(mapping.export(parameters(one_block), one_block, layouts.HF5)) == {
        "classifier.bias",
        "classifier.weight",
        "vit.embeddings.cls_token",
        "vit.embeddings.patch_embeddings.projection.bias",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.embeddings.position_embeddings",
        *(
            f"vit.layers.0.{layer}.{leaf}"
            for layer in (
                "attention.k_proj",
                "attention.o_proj",
                "attention.q_proj",
                "attention.v_proj",
                "layernorm_after",
                "layernorm_before",
                "mlp.fc1",
                "mlp.fc2",
            )
            for leaf in ("bias", "weight")
        ),
        "vit.layernorm.bias",
        "vit.layernorm.weight",
    }


# Hugging Face's PyTorch name of every tensor, and its name in the other layouts. They are read off a FlaxViT tree,
# transformers 5.23.0's `state_dict()`, vit_jax/models_vit.py, big_vision/models/vit.py and
# timm/models/vision_transformer.py. They are written out beside the rules, so that a slip has to be made twice.
COLUMNS = ("flax", "hf5", "npz", "big_vision", "timm")
NAMES = {
    "embeddings.cls_token": (
        "embeddings/cls_token",
        "embeddings.cls_token",
        "cls",
        "cls",
        "cls_token",
    ),
    "embeddings.position_embeddings": (
        "embeddings/position_embeddings",
        "embeddings.position_embeddings",
        "Transformer/posembed_input/pos_embedding",
        "pos_embedding",
        "pos_embed",
    ),
    "embeddings.patch_embeddings.projection": (
        "embeddings/patch_embeddings/projection",
        "embeddings.patch_embeddings.projection",
        "embedding",
        "embedding",
        "patch_embed.proj",
    ),
    "encoder.layer.0.layernorm_before": (
        "encoder/layer/0/layernorm_before",
        "layers.0.layernorm_before",
        "Transformer/encoderblock_0/LayerNorm_0",
        "Transformer/encoderblock_0/LayerNorm_0",
        "blocks.0.norm1",
    ),
    "encoder.layer.0.attention.attention.query": (
        "encoder/layer/0/attention/attention/query",
        "layers.0.attention.q_proj",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query",
        "blocks.0.attn.qkv",
    ),
    "encoder.layer.0.attention.attention.key": (
        "encoder/layer/0/attention/attention/key",
        "layers.0.attention.k_proj",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/key",
        "blocks.0.attn.qkv",
    ),
    "encoder.layer.0.attention.attention.value": (
        "encoder/layer/0/attention/attention/value",
        "layers.0.attention.v_proj",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/value",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/value",
        "blocks.0.attn.qkv",
    ),
    "encoder.layer.0.attention.output.dense": (
        "encoder/layer/0/attention/output/dense",
        "layers.0.attention.o_proj",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out",
        "blocks.0.attn.proj",
    ),
    "encoder.layer.0.layernorm_after": (
        "encoder/layer/0/layernorm_after",
        "layers.0.layernorm_after",
        "Transformer/encoderblock_0/LayerNorm_2",
        "Transformer/encoderblock_0/LayerNorm_1",
        "blocks.0.norm2",
    ),
    "encoder.layer.0.intermediate.dense": (
        "encoder/layer/0/intermediate/dense",
        "layers.0.mlp.fc1",
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0",
        "Transformer/encoderblock_0/MlpBlock_0/Dense_0",
        "blocks.0.mlp.fc1",
    ),
    "encoder.layer.0.output.dense": (
        "encoder/layer/0/output/dense",
        "layers.0.mlp.fc2",
        "Transformer/encoderblock_0/MlpBlock_3/Dense_1",
        "Transformer/encoderblock_0/MlpBlock_0/Dense_1",
        "blocks.0.mlp.fc2",
    ),
    "layernorm": (
        "layernorm",
        "layernorm",
        "Transformer/encoder_norm",
        "Transformer/encoder_norm",
        "norm",
    ),
    "classifier": (
        "classifier",
        "classifier",
        "head",
        "head",
        "head",
    ),
}


def pytorch_to_flax(name: str, tensor: NDArray) -> tuple[str, NDArray]:
    """Returns the leaf name and value in flax of a PyTorch tensor: kernels (in, out), (height, width, in, out)."""
    if "norm" in name:
        return ("scale" if name.endswith("weight") else "bias"), tensor
    if tensor.ndim == 4:
        return "kernel", np.einsum("oihw->hwio", tensor)
    return ("kernel", np.einsum("oi->io", tensor)) if name.endswith("weight") else ("bias", tensor)


@pytest.mark.parametrize("layout", COLUMNS)
def test_every_layout_is_hugging_faces_under_other_names(layout: str) -> None:
    config = ViTConfig(**{**CONFIG.__dict__, "num_hidden_layers": 1})
    ours = with_room(LAYOUTS[layout], parameters(config))
    theirs = mapping.export(ours, config, layouts.HF)
    separator = "/" if layout in ("flax", "npz", "big_vision") else "."
    prefix = {"flax": "vit/", "hf5": "vit."}.get(layout, "")
    expected: dict[str, list[NDArray]] = {}
    for stem, columns in NAMES.items():
        renamed = columns[COLUMNS.index(layout)]
        for leaf in ("", ".weight", ".bias"):
            name = f"{stem}{leaf}" if stem == "classifier" else f"vit.{stem}{leaf}"
            if name not in theirs:
                continue
            end, tensor = leaf.removeprefix("."), theirs[name]
            if leaf and separator == "/":
                end, tensor = pytorch_to_flax(name, tensor)
            full = f"{renamed}{separator}{end}" if leaf else renamed
            if "MultiHeadDotProductAttention" in full and not full.endswith("out/bias"):
                heads, width = config.num_attention_heads, config.head_dim
                apart = {"out/kernel": (heads, width, -1), "bias": (heads, width)}
                tensor = tensor.reshape(next((s for key, s in apart.items() if full.endswith(key)), (-1, heads, width)))
            if full == "pos_embedding":
                tensor = tensor[:, 1:]
            # Query, key and value, in this order, are the rows of one layer in timm.
            expected.setdefault(full if stem == "classifier" else prefix + full, []).append(tensor)
    found = mapping.export(ours, config, LAYOUTS[layout])
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        np.testing.assert_array_equal(found[name], np.concatenate(tensors), err_msg=name)
