"""Is every valid configuration accepted and written back, and every invalid one refused with its reason?"""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.vit_strategies import INVALID, configs, times
from vit_ref.errors import ConfigError
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters

# "\u00b2", a superscript two, is a digit and not a number.
names_of_no_variant = st.one_of(
    st.sampled_from(("", "B", "B/", "/16", "b/16", "B/-1", "B/1.5", "B/\u00b2", "B/16/", "ViT-B/16")),
    st.text(max_size=4),
).filter(lambda name: not re.fullmatch(r"(Ti|S|B|L|H)/\d+", name))


@pytest.mark.parametrize("fault", INVALID)
@times(4)
@given(data=st.data())
def test_an_invalid_configuration_is_refused_with_its_reason(fault: str, data: st.DataObject) -> None:
    fields, message = data.draw(INVALID[fault], label="ViTConfig(**fields), message")
    with pytest.raises(ConfigError) as caught:
        ViTConfig(**fields)
    assert str(caught.value) == message


@times(20)
@given(name=names_of_no_variant)
def test_a_variant_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ViTConfig.variant(name)
    assert str(caught.value) == f"variant is {name!r}: give one of Ti, S, B, L, H, a slash and a patch size"


@times(20)
@given(config=configs())
def test_a_configuration_is_printed_as_the_code_that_makes_it(config: ViTConfig) -> None:
    again = eval(repr(config), {"ViTConfig": ViTConfig})
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


@times(20)
@given(config=configs())
def test_a_configuration_survives_its_config_json(config: ViTConfig) -> None:
    again = ViTConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    # Hugging Face's config does not say whether there is a pooler. The tensors of the checkpoint do.
    assert dataclasses.replace(again, pooler=config.pooler) == config


@times(4)
@given(config=configs(max_blocks=4))
def test_the_number_of_parameters_has_a_closed_form(config: ViTConfig) -> None:
    width, hidden = config.hidden_size, config.intermediate_size
    (image_height, image_width), (height, breadth) = config.image_hw, config.patch_hw
    tokens = image_height * image_width // (height * breadth) + 1
    # A dense layer from m to n has (m + 1) n parameters, and a LayerNorm 2 D. The cls token is one more row of D.
    patch = (height * breadth * config.num_channels + 1) * width
    attention = 3 * (width + config.qkv_bias) * width + (width + 1) * width
    mlp = (width + 1) * hidden + (hidden + 1) * width
    blocks = config.num_hidden_layers * (4 * width + attention + mlp)
    outputs = (config.pooler_output_size or width) if config.pooler else config.num_labels
    foretold = patch + width + tokens * width + blocks + 2 * width + (width + 1) * outputs
    assert sum(int(np.prod(shape)) for shape in list_parameters(config).values()) == foretold
