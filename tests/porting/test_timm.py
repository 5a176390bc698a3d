"""Is timm's config.json read as the model that timm builds, and refused if this package's model is another?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vit_ref
from vit_ref.errors import ConfigError, MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import CASES
from vit_ref.weights import checkpoint, layouts, mapping, pretrained, writing
from vit_ref.weights.timm import from_timm, to_timm

# timm 1.0.31 writes this for vit_base_patch16_224.
PRETRAINED = {
    "tag": "augreg2_in21k_ft_in1k",
    "custom_load": False,
    "input_size": [3, 224, 224],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.1, 0.2, 0.3],
    "num_classes": 1000,
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
CONTENT = {
    "architecture": "vit_base_patch16_224",
    "num_classes": 1000,
    "num_features": 768,
    "global_pool": "token",
    "model_args": {"in_chans": 3, "num_classes": 1000, "global_pool": "token", "img_size": [224, 224]},
    "pretrained_cfg": PRETRAINED,
}


def named(architecture: str, **arguments: Any) -> ViTConfig:
    return from_timm({**CONTENT, "architecture": architecture, "model_args": arguments})


# Width, depth, heads, MLP and bias of query, key and value, as timm 1.0.31 builds them. All have epsilon 1e-6 and erf
# GELU.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", (192, 12, 3, 768, True)),
        ("vit_small_patch32_384", (384, 12, 6, 1536, True)),
        ("vit_base_patch16_224", (768, 12, 12, 3072, True)),
        ("vit_base_patch16_224.mae", (768, 12, 12, 3072, True)),
        ("vit_base_patch16_224_in21k", (768, 12, 12, 3072, True)),
        ("vit_base_patch16_224_miil", (768, 12, 12, 3072, False)),
        ("vit_large_patch14_224", (1024, 24, 16, 4096, True)),
        ("vit_huge_patch14_224", (1280, 32, 16, 5120, True)),
        ("deit_small_patch16_224", (384, 12, 6, 1536, True)),
    ],
)
def test_an_architecture_says_what_the_model_is(name: str, expected: tuple[int, ...]) -> None:
    config = named(name)
    found = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.qkv_bias,
    )
    assert found == expected
    assert (config.hidden_act, config.layer_norm_eps, config.pooler) == ("gelu", 1e-6, False)
    side = int(name.split("_patch")[1].partition("_")[0])
    assert (config.patch_hw, config.image_hw) == ((side, side), (224, 224))


def test_a_config_of_timms_is_read_whole() -> None:
    config = from_timm({**CONTENT, "num_classes": 3, "model_args": {}, "label_names": ["n01", "n02", "n03"]})
    assert config == ViTConfig.variant("B/16", layer_norm_eps=1e-6, num_labels=3)
    assert config.labels == ("n01", "n02", "n03") and config.extra == {}
    assert config.preprocessor == {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.1, 0.2, 0.3],
    }


def test_the_older_form_with_everything_in_one_object_is_read() -> None:
    flat = {**PRETRAINED, "architecture": "vit_base_patch16_384", "input_size": [3, 384, 384], "num_classes": 7}
    config = from_timm(flat)
    assert config == ViTConfig.variant("B/16", layer_norm_eps=1e-6, num_labels=7, image_size=384)
    assert config.preprocessor is not None and config.preprocessor["size"] == {"height": 384, "width": 384}


def test_arguments_of_the_model_take_precedence() -> None:
    config = named(
        "vit_base_patch16_224",
        embed_dim=24,
        depth=3,
        num_heads=4,
        mlp_ratio=2.5,
        patch_size=[4, 2],
        img_size=[8, 6],
        in_chans=5,
        num_classes=9,
        qkv_bias=False,
        act_layer="quick_gelu",
        class_token=True,
        attn_drop_rate=0.5,
    )
    assert config == ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=60,
        patch_size=(4, 2),
        image_size=(8, 6),
        num_channels=5,
        num_labels=9,
        qkv_bias=False,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-6,
    )
    assert config.preprocessor is not None and config.preprocessor["size"] == {"height": 8, "width": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"architecture": name}, f"architecture is '{name}': give one of timm's plain ViTs")
            for name in (
                "vit_base_patch14_reg4_dinov2",  # registers, LayerScale
                "vit_base_patch16_clip_224",  # norm before the blocks
                "vit_medium_patch16_gap_240",  # no cls token
                "vit_base_patch16_siglip_224",  # pooling by attention
                "vit_base_patch16_rpn_224",  # norm after the layers
                "vit_relpos_base_patch16_224",
                "deit3_base_patch16_224",  # LayerScale, no position for the cls token
                "deit_base_distilled_patch16_224",  # a second class token
                "vit_base_r50_s16_224",
                "vit_small_patch16_36x1_224",
                "resnet50",
                "vit_base_patch0_224",
            )
        ),
        *(
            (
                {"model_args": {name: value}},
                f"model_args: {name} is {value!r}, which this model does not support: give another model",
            )
            for name, value in {
                "class_token": False,
                "global_pool": "avg",
                "reg_tokens": 4,
                "pre_norm": True,
                "qk_norm": True,
                "init_values": 1e-5,
                "no_embed_class": True,
                "final_norm": False,
                "mlp_layer": "swiglu",
                "norm_layer": "rmsnorm",
            }.items()
        ),
        ({"global_pool": "map"}, "global_pool is 'map': give a model with 'token', whose head reads the cls token"),
        ({"model_args": {"act_layer": "mish"}}, "model_args: act_layer is 'mish': give one of gelu, gelu_tanh, "),
        ({"model_args": {"act_layer": ["gelu"]}}, "model_args: act_layer is ['gelu']: give one of "),
        ({"model_args": {"mlp_ratio": 0}}, "model_args: embed_dim is 768 and mlp_ratio 0: give positive"),
        ({"model_args": {"mlp_ratio": "4"}}, "model_args: embed_dim is 768 and mlp_ratio '4': give positive"),
        ({"model_args": {"embed_dim": "768"}}, "model_args: embed_dim is '768' and mlp_ratio 4.0: give positive"),
        ({"model_args": {"num_heads": 7}}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ({"model_args": []}, "model_args is []: give a JSON object"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg is 'x': give a JSON object"),
        ({"pretrained_cfg": {"input_size": [224, 224]}}, "pretrained_cfg: input_size is [224, 224]: give channels, "),
        (
            {"pretrained_cfg": {"interpolation": "random"}},
            "pretrained_cfg: interpolation is 'random': give one of near",
        ),
        ({"num_classes": "many"}, "num_labels is 'many': give an integer"),
        ({"num_classes": 2, "label_names": ["one"], "model_args": {}}, "there are 1 labels and num_labels is 2"),
    ],
)
def test_what_this_model_cannot_be_is_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_timm({**CONTENT, "model_args": {}, **change})
    assert str(caught.value).startswith(message)


WRITABLE = {
    name: replace(case.config, layer_norm_eps=1e-6, pooler=False, hidden_dropout_prob=0.0)
    for name, case in CASES.items()
}


@pytest.mark.parametrize("name", WRITABLE)
def test_a_config_that_timm_can_have_comes_back(name: str) -> None:
    config = WRITABLE[name]
    again = from_timm(to_timm(config))
    # gelu_new is another name of gelu_pytorch_tanh, and silu and swish are one function.
    known = replace(again, hidden_act=config.hidden_act) if config.hidden_act in ("gelu_new", "swish") else again
    assert known == replace(config, attention_probs_dropout_prob=0.0, pooler_output_size=None)
    assert again.hidden_act == {"gelu_new": "gelu_pytorch_tanh"}.get(config.hidden_act, config.hidden_act)


@pytest.mark.parametrize("width", [3, 7, 33, 49, 768])
def test_the_width_of_the_mlp_survives_its_ratio(width: int) -> None:
    for mlp in range(1, 5 * width, 1 + width // 50):
        config = ViTConfig(hidden_size=width, num_attention_heads=1, intermediate_size=mlp, layer_norm_eps=1e-6)
        assert from_timm(to_timm(config)).intermediate_size == mlp


def test_a_published_architecture_is_written_without_arguments() -> None:
    for name, architecture in (("B/16", "vit_base_patch16_224"), ("Ti/16", "vit_tiny_patch16_224")):
        for side in (224, 384):
            written = to_timm(ViTConfig.variant(name, layer_norm_eps=1e-6, image_size=side))
            assert written["architecture"] == architecture and "model_args" not in written
            assert written["pretrained_cfg"]["input_size"] == [3, side, side]


def test_a_timm_directory_is_loaded_with_its_own_tensors(tmp_path: Path) -> None:
    config = replace(CASES["rectangular"].config, layer_norm_eps=1e-6)
    parameters = mapping.port(CASES["rectangular"].checkpoint().tensors, config, layouts.HF)
    writing.write_directory(tmp_path, mapping.export(parameters, config, layouts.TIMM), to_timm(config))
    for path in (tmp_path, tmp_path / checkpoint.WEIGHTS):
        model = vit_ref.from_pretrained(path)
        assert replace(model.config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2) == config
        found = pretrained.get_parameters(model)
        assert {name: value.tobytes() for name, value in found.items()} == {
            name: np.ascontiguousarray(value).tobytes() for name, value in parameters.items()
        }
    # A Hugging Face config.json gets no entry of timm's.
    vit_ref.save_pretrained(model, tmp_path / "hf")
    written = checkpoint.read(tmp_path / "hf").config
    assert written is not None and written["model_type"] == "vit" and "architecture" not in written
    with_config = vit_ref.from_pretrained(tmp_path, config=config)
    assert with_config.config.extra == {} and with_config.config == config


def test_a_block_that_is_missing_is_missed(tmp_path: Path) -> None:
    config = replace(CASES["rectangular"].config, layer_norm_eps=1e-6)
    parameters = mapping.port(CASES["rectangular"].checkpoint().tensors, config, layouts.HF)
    tensors = mapping.export(parameters, config, layouts.TIMM)
    kept = {name: value for name, value in tensors.items() if not name.startswith("blocks.1.")}
    writing.write_directory(tmp_path, kept, to_timm(config))
    with pytest.raises(MappingError) as caught:
        vit_ref.from_pretrained(tmp_path)
    assert {(fault.kind, fault.name) for fault in caught.value.faults} == {
        ("missing", name) for name in tensors.keys() - kept.keys()
    }


@pytest.mark.parametrize(
    "extra", ["reg_token", "dist_token", "head_dist.weight", "norm_pre.weight", "fc_norm.bias", "blocks.0.ls1.gamma"]
)
def test_a_tensor_of_another_kind_of_vit_is_unexpected(extra: str) -> None:
    config = replace(CASES["rectangular"].config, layer_norm_eps=1e-6)
    parameters = mapping.port(CASES["rectangular"].checkpoint().tensors, config, layouts.HF)
    tensors = {**mapping.export(parameters, config, layouts.TIMM), extra: np.zeros(33, np.float32)}
    with pytest.raises(MappingError) as caught:
        mapping.port(tensors, config, mapping.detect(tensors))
    assert [(fault.kind, fault.name) for fault in caught.value.faults] == [("unexpected", extra)]


@pytest.mark.parametrize("preprocessor", [{"resample": 9}, {"do_resize": "perhaps"}])
def test_preprocessing_that_cannot_be_followed_is_not_written(preprocessor: dict[str, Any]) -> None:
    config = replace(ViTConfig(), preprocessor=preprocessor)
    assert "mean" not in to_timm(config)["pretrained_cfg"]
