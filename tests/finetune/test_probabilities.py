"""Do the logits of a head mean what its configuration says?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vit_ref.errors import ConfigError
from vit_ref.finetune.probabilities import compute_scores, name_unit
from vit_ref.model.config import ViTConfig

LOGITS = np.array([-1.5, 0.25, 3.0])
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum()
SIGMOID = 1 / (1 + np.exp(-LOGITS))


def config_of(problem_type: Any, labels: int) -> ViTConfig:
    return ViTConfig(num_labels=labels, extra={"problem_type": problem_type})


# (problem_type, number of labels) -> the output for the first logits, and whether it is probabilities
MEANINGS = [
    (None, 3, SOFTMAX, "probability"),
    ("single_label_classification", 3, SOFTMAX, "probability"),
    ("multi_label_classification", 3, SIGMOID, "probability"),
    ("regression", 3, LOGITS, "value"),
    (None, 1, SIGMOID[:1], "probability"),
    ("single_label_classification", 1, SIGMOID[:1], "probability"),
    ("multi_label_classification", 1, SIGMOID[:1], "probability"),
    ("regression", 1, LOGITS[:1], "value"),
]


@pytest.mark.parametrize(("problem_type", "labels", "expected", "kind"), MEANINGS)
def test_problem_type_and_number_of_labels_decide(
    problem_type: str | None, labels: int, expected: np.ndarray, kind: str
) -> None:
    config = config_of(problem_type, labels)
    assert name_unit(config) == kind
    # float64 throughout, and a handful of operations.
    np.testing.assert_allclose(compute_scores(LOGITS[:labels], config), expected, rtol=1e-15)
    batch = np.stack([LOGITS[:labels], np.zeros(labels)])
    np.testing.assert_allclose(compute_scores(batch, config)[0], expected, rtol=1e-15)


@pytest.mark.parametrize(("problem_type", "labels", "expected", "kind"), MEANINGS)
def test_the_pipeline_of_transformers_agrees_except_regressions(
    problem_type: str | None, labels: int, expected: np.ndarray, kind: str
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(problem_type=problem_type, num_labels=labels)
    pipeline: Any = SimpleNamespace(model=SimpleNamespace(config=config), framework="pt")
    outputs = {"logits": torch.tensor(LOGITS[None, :labels])}
    found = transformers.ImageClassificationPipeline.postprocess(pipeline, outputs)
    printed = np.array([each["score"] for each in found])
    assert np.allclose(printed, sorted(expected, reverse=True), rtol=1e-12) == (kind == "probability")


@pytest.mark.parametrize("problem_type", ["something_else", "", 3, ["regression"]])
def test_an_unknown_problem_type_is_refused(problem_type: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        compute_scores(LOGITS, config_of(problem_type, 3))
    assert str(caught.value) == (
        f"config.json: problem_type is {problem_type!r}, which is unknown: give one of"
        " single_label_classification, multi_label_classification, regression, or leave it out"
    )
