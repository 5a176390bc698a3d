"""Does `compare`, which knows no ViT, reach the verdict of `verify` on a ViT, site for site?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vit_ref
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.pairs import pretrained
from vit_ref.verify.results import CandidateReport
from vit_ref.verify.session import check_port

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")
transformers = pytest.importorskip("transformers", minversion="4.57", reason="needs transformers 4.57")
pytestmark = pytest.mark.torch

CASE = Case("twin", dataclasses.replace(CASES["rectangular"].config, num_hidden_layers=2))


def load_twin(checkpoint: Path) -> Any:
    """PyTorch's ViT, whose attention shows its probabilities."""
    return transformers.ViTForImageClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()


def sites() -> dict[str, Any]:
    """Returns the table from the paths of transformers 4 to the sites of `verify`."""
    heads = CASE.config.num_attention_heads

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads, -1)

    block = {
        "layernorm_before": "norm1",
        "attention.attention[1]": "attn.probs",
        "attention.output.dense:input": "attn.context",
        "attention.output.dense": "attn.out",
        "layernorm_after:input": "attn.residual",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense:input": "mlp.hidden",
        "output.dense": "mlp.out",
    }
    table: dict[str, Any] = {f"vit.encoder.layer.{{i}}.{path}": f"block.{{i}}.{site}" for path, site in block.items()}
    for role in ("query", "key", "value"):
        table[f"vit.encoder.layer.{{i}}.attention.attention.{role}"] = (f"block.{{i}}.attn.{role}", split)
    return table | {
        "vit.encoder.layer.{i}": "block.{i}.mlp.residual",
        "vit.embeddings.patch_embeddings": "patches",
        "vit.embeddings": "embeddings",
        "vit.layernorm": "norm",
        "classifier": "logits",
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.write(tmp_path_factory.mktemp("checkpoints") / "twin").path


def compared(checkpoint: Path, model: Any) -> CandidateReport:
    twin = vit_ref.Reference(
        load=load_twin,
        sites=sites(),
        inputs=lambda seed: {"pixel_values": CASE.images()},
        adapt=pretrained.reference.adapt,
        name="PyTorch",
    )
    return vit_ref.compare(twin, vit_ref.Candidate(load=model, name="mine"), checkpoint, backward=False)


def verdicts(report: CandidateReport) -> dict[str, tuple[str, bool]]:
    return {
        result.site: (result.failure("float32")[:20], result.exact.passes_semantic_gate)
        for result in report.forward.results
        if result.site != "output"
    }


@pytest.mark.parametrize("act", [None, "gelu_new"], ids=["right", "tanh GELU"])
def test_compare_reaches_the_verdict_of_verify_at_every_site(checkpoint: Path, act: str | None) -> None:
    def load(path: Path, dtype: Any) -> Any:
        model = vit_ref.from_pretrained(path, dtype=dtype)
        if act:
            for block in model.blocks:
                block.mlp.activation = act
        return model

    found = compared(checkpoint, load)
    known = check_port(vit_ref.Candidate(load=load, name="mine"), checkpoint, reference="torch", backward=False)
    ours, theirs = verdicts(found), verdicts(known)
    # The order differs within attention: transformers computes the key before the query.
    assert ours == theirs and len(ours) == 30
    assert found.passed == known.passed == (act is None)
    errors = {result.site: result.exact.rms for result in found.forward.results}
    for other in known.forward.semantic_failures:
        np.testing.assert_allclose(errors[other.site], other.exact.rms, rtol=0.5)


def test_a_directory_of_transformers_is_a_reference_by_itself(checkpoint: Path) -> None:
    model = pretrained.load(checkpoint)
    assert type(model).__name__ == "ViTModel" and not model.training


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    for place, message in ((None, "no checkpoint is given: give --checkpoint"), (tmp_path, r"it has no config\.json")):
        with pytest.raises(vit_ref.InputError, match=message):
            pretrained.load(place)
