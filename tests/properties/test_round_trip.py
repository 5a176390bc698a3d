"""Does a checkpoint of any configuration come back from the model as it went in, in every layout?"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.vit_strategies import configs, random_bits, seeds, times, with_room, within
from vit_ref.model.config import ViTConfig
from vit_ref.weights import mapping
from vit_ref.weights.layouts import LAYOUTS

dtypes = st.sampled_from((np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@times(2)
@given(config=configs(), dtype=dtypes, seed=seeds)
def test_port_export_port_is_the_identity(layout: str, config: ViTConfig, dtype: type, seed: int) -> None:
    config = within(LAYOUTS[layout], config)
    parameters = with_room(LAYOUTS[layout], random_bits(config, dtype, seed))
    source = mapping.export(parameters, config, LAYOUTS[layout])
    # The names alone tell the layout again.
    ported = mapping.port(source, config, mapping.detect(source))
    assert {path: (value.dtype, value.shape, value.tobytes()) for path, value in ported.items()} == {
        path: (value.dtype, value.shape, value.tobytes()) for path, value in parameters.items()
    }
    again = mapping.export(ported, config, LAYOUTS[layout])
    assert {name: (value.shape, value.tobytes()) for name, value in again.items()} == {
        name: (value.shape, value.tobytes()) for name, value in source.items()
    }
