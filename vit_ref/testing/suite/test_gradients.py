"""Is the candidate numerically right backward: at every site, for every parameter and for the pixels?"""

from __future__ import annotations

import pytest

from vit_ref.verify.report import excerpt, headline
from vit_ref.verify.results import ParityReport


def test_semantic_gate_float64_backward(gradients: ParityReport) -> None:
    if gradients.semantic_failures or gradients.unobserved:
        pytest.fail(f"{headline(gradients)}\n\n{excerpt(gradients)}", pytrace=False)


def test_numerical_gate_backward(gradients: ParityReport) -> None:
    if gradients.numerical_failures or gradients.unobserved:
        pytest.fail(f"{headline(gradients)}\n\n{excerpt(gradients)}", pytrace=False)
