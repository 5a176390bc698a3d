"""Does GELU keep its digits far below zero, and is it rounded once in half precision?"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vit_ref.model.activations import ACTIVATIONS
from vit_ref.verify.references import numpy_oracle

FORMS = ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh")


@pytest.mark.parametrize("name", ["gelu", "gelu_python"])
def test_the_erf_form_keeps_its_tail_in_float32(name: str) -> None:
    """Computes erfc. 0.5 x (1 + erf) errs by percents at -5 and is 0 at -8, as in PyTorch."""
    x = np.linspace(-8, 8, 1601, dtype=np.float32)
    truth = numpy_oracle.ACTIVATIONS[name](x.astype(np.float64))
    # In the tail a change of x by one unit of rounding changes the result by x^2 units. Two such changes are measured,
    # and four are allowed. The other formula errs by a million units at -5.
    bound = 2.0**-23 * 4 * (1 + np.square(x, dtype=np.float64)) * np.abs(truth)
    assert (np.abs(np.asarray(ACTIVATIONS[name](jnp.asarray(x)), np.float64) - truth) <= bound).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", FORMS)
def test_in_half_precision_gelu_is_rounded_once(name: str, dtype: type) -> None:
    """Computes in float32. `jax.nn.gelu` rounds 1 + tanh to bfloat16, too, which is 61 % of the result at -3."""
    x = jnp.asarray(np.linspace(-8, 8, 1601), dtype)
    exact = np.asarray(x, np.float64)
    truth = numpy_oracle.ACTIVATIONS[name](exact)
    found = ACTIVATIONS[name](x)
    assert found.dtype == dtype
    # Half a unit of the result, and the cancellation in 1 + erf and 1 + tanh, whose terms are float32.
    bound = 0.51 * float(jnp.finfo(dtype).eps) * np.abs(truth) + 2.0**-23 * (1 + np.abs(exact))
    assert (np.abs(np.asarray(found, np.float64) - truth) <= bound).all()
