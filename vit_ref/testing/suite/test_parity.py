"""Is the candidate numerically right forward, at every site?"""

from __future__ import annotations

import pytest

from vit_ref.verify.report import excerpt, headline
from vit_ref.verify.results import ParityReport


def test_semantic_gate_float64(parity: ParityReport) -> None:
    if parity.semantic_failures or parity.unobserved:
        pytest.fail(f"{headline(parity)}\n\n{excerpt(parity)}", pytrace=False)


def test_numerical_gate(parity: ParityReport) -> None:
    if parity.numerical_failures or parity.unobserved:
        pytest.fail(f"{headline(parity)}\n\n{excerpt(parity)}", pytrace=False)
