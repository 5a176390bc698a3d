"""Known kinds of models: a right candidate passes; a wrong one is localised, and named where a cause explains it."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

import vit_ref
from tests.compare.pairs.mutants import MUTANTS
from vit_ref.verify.candidates.loading import beside_it
from vit_ref.verify.results import CandidateReport

pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
pytestmark = pytest.mark.torch

PAIRS = Path(__file__).parent / "pairs"
families = pytest.mark.parametrize("name", MUTANTS)


@cache
def family(name: str) -> Any:
    """Returns the `Family` in that pair's file, which imports its neighbours."""
    spec = importlib.util.spec_from_file_location(f"pair_{name}", PAIRS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with beside_it(str(PAIRS)):
        spec.loader.exec_module(module)
    return module.FAMILY


def failed(report: CandidateReport) -> list[str]:
    return [f"{check.name}: {check.reason}" for check in report.checks if check.status == "failed"]


@families
def test_a_right_candidate_passes_at_every_site_of_its_table(name: str) -> None:
    pair = family(name)
    # A second block would only double the time to compile: tests/compare/test_compare.py counts them.
    config = {**pair.config, "num_hidden_layers": 1}
    report = vit_ref.compare(pair.reference(config), pair.candidate(config))
    assert failed(report) == []
    assert report.passed
    claimed = [site if isinstance(site, str) else site[0] for site in pair.sites(config).values()]
    judged = {result.site for result in report.forward.results}
    assert judged == {site.replace("{i}", "0") for site in claimed} | {"output"}


@pytest.mark.parametrize(("name", "mutant"), [(name, mutant) for name in MUTANTS for mutant in MUTANTS[name]])
def test_a_wrong_candidate_is_localised(name: str, mutant: str) -> None:
    pair, (_, site, cause, _) = family(name), MUTANTS[name][mutant]
    report = vit_ref.compare(pair.reference(), pair.candidate(mutant=mutant), fail_fast=True)
    assert not report.passed
    assert report.forward.semantic_failures[0].site == site
    labels = [each.label for each in report.forward.causes]
    assert any(label.startswith(cause) for label in labels) if cause else labels == []


# A hundred in the profile "thorough", each of which takes seconds.
EXAMPLES = max(1, 2 * settings.default.max_examples // 5)


@families
# A seed cannot be made simpler.
@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(seed=st.integers(0, 2**32 - 1))
def test_no_right_candidate_is_refused(name: str, seed: int) -> None:
    pair = family(name)
    config, shape = pair.draw(np.random.default_rng(seed))
    note(f"{config}, inputs of {shape}")
    report = vit_ref.compare(pair.reference(config, shape, seed=seed), pair.candidate(config), seed=seed)
    if EXAMPLES > 1:
        # Each example compiles programs that no other one runs, and many would fill the memory.
        jax.clear_caches()
    assert failed(report) == []
