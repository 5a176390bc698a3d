"""Is the port numerically right, backward: for every parameter, every site and the pixels?"""

from __future__ import annotations

import pytest

from vit_ref.verify.parity import ParityReport
from vit_ref.verify.report import headline, table

pytestmark = pytest.mark.parity


def test_semantic_gate_float64_backward(gradients: ParityReport) -> None:
    if gradients.semantic_failures or gradients.unobserved:
        pytest.fail(f"{headline(gradients)}\n\n{table(gradients)}", pytrace=False)


def test_numerical_gate_backward(gradients: ParityReport) -> None:
    if gradients.numerical_failures or gradients.unobserved:
        pytest.fail(f"{headline(gradients)}\n\n{table(gradients)}", pytrace=False)


def test_gradients_are_reported_in_the_order_of_the_pass(gradients: ParityReport) -> None:
    observed = [name for name in gradients.order if name not in gradients.unobserved]
    assert [result.site for result in gradients.results] == observed
    assert gradients.order[-1] == "pixels"
