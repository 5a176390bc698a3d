"""In half precision, does float32 stay where it must, on the path with a tap and on the one without?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from tests.helpers.jaxprs import computed_in, equations
from tests.helpers.precisions import precision_of
from vit_ref.model.vit import VisionTransformer
from vit_ref.verify.cases import CASES

CASE = CASES["rectangular"]
FLOAT32 = np.dtype(np.float32)
# The softmax: exp, its maximum, sum and quotient. LayerNorm: means, squares, reciprocal root and, with the token
# stream,
# the sums.
WIDE = {"exp", "reduce_max", "reduce_sum", "div", "integer_pow", "square", "sqrt", "rsqrt", "sub"}
PRODUCTS = {"dot_general", "conv_general_dilated"}


@pytest.mark.parametrize("tapped", [False, True], ids=["untapped", "tapped"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_and_norms_are_computed_in_float32(
    dtype: DTypeLike, tapped: bool, filled: Callable[..., VisionTransformer]
) -> None:
    tap = {"tap": lambda site, value: value} if tapped else {}
    with precision_of(dtype).active():
        vit = filled(CASE.config, dtype=dtype)
        traced = jax.make_jaxpr(lambda pixels: vit(pixels, **tap))(CASE.images()).jaxpr
    found = computed_in(traced, WIDE)
    assert {"exp", "reduce_max", "reduce_sum", "div", "rsqrt"} <= set(found)
    assert set().union(*found.values()) == {FLOAT32}, found
    # The arguments of the softmax are products of queries with keys, one a block, and keep float32. All other products
    # are rounded.
    products = [e.outvars[0].aval.dtype for e in equations(traced) if e.primitive.name in PRODUCTS]
    blocks = CASE.config.num_hidden_layers
    assert Counter(products)[FLOAT32] == blocks
    assert Counter(products)[np.dtype(dtype)] == len(products) - blocks
