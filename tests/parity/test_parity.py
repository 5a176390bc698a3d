"""Is the port numerically right, forward, at every site?"""

from __future__ import annotations

import pytest

from vit_ref.verify.gates import SEMANTIC_RMS
from vit_ref.verify.parity import ParityReport
from vit_ref.verify.report import headline, table

pytestmark = pytest.mark.parity


def test_reference_and_numpy_oracle_agree_in_float64(parity: ParityReport) -> None:
    apart = [result for result in parity.results if not result.oracles.passes_semantic_gate]
    lines = [f"{result.site}: {result.oracles.rms:.1e}, gate {SEMANTIC_RMS:.0e}" for result in apart]
    assert not apart, "the two oracles differ, so neither can judge:\n" + "\n".join(lines)


def test_semantic_gate_float64(parity: ParityReport) -> None:
    if parity.semantic_failures or parity.unobserved:
        pytest.fail(f"{headline(parity)}\n\n{table(parity)}", pytrace=False)


def test_numerical_gate(parity: ParityReport) -> None:
    if parity.numerical_failures or parity.unobserved:
        pytest.fail(f"{headline(parity)}\n\n{table(parity)}", pytrace=False)


def test_sites_are_reported_in_the_order_of_the_pass(parity: ParityReport) -> None:
    assert [result.site for result in parity.results] == [
        site for site in parity.order if site not in parity.unobserved
    ]
    assert parity.order[:2] == ("patches", "embeddings")
