"""Does the example's table fit every ViT, does it say what to install, and is bonsai's GELU found with it?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vit_ref.cli.commands import main
from vit_ref.model.sites import sites
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.candidates.loading import find
from vit_ref.verify.candidates.table import claimed
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.cases import CASES
from vit_ref.verify.report import summary
from vit_ref.verify.session import check_port

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "bonsai_vit.py")
CONFIG = CASES["rectangular"].config


def test_the_table_names_every_site_but_probabilities_and_output() -> None:
    outline = ViTOutline(CONFIG)
    named = claimed(find(EXAMPLE).sites, outline, outline.shapes(outline.example))
    known = {site.name for site in sites(CONFIG, 1)}
    assert named <= known
    assert known - named == {"block.0.attn.probs", "block.1.attn.probs", "logits"}


def test_the_table_names_every_parameter_once() -> None:
    parameters = find(EXAMPLE).parameters
    assert parameters is not None
    named = [
        target.replace("{i}", str(i)) for target in parameters.values() for i in range(2 if "{i}" in target else 1)
    ]
    assert sorted(named) == sorted(list_parameters(CONFIG))


def test_without_bonsai_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bonsai", None)
    result = CliRunner().invoke(main, ["verify", "--forward-only", "--candidate", EXAMPLE])
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "pip install 'git+https://github.com/jax-ml/bonsai' (bonsai_vit.py, line " in line


def test_its_gelu_is_found(tmp_path: Path) -> None:
    pytest.importorskip("bonsai.models.vit", reason="needs bonsai: pip install 'git+https://github.com/jax-ml/bonsai'")
    report = check_port(find(EXAMPLE), CASES["rectangular"].write(tmp_path / "case").path, backward=False)
    assert "first divergence at block.0.mlp.hidden" in summary(report)
    assert [cause.label for cause in report.forward.causes] == ["tanh GELU"]
