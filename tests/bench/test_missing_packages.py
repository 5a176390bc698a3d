"""Are benchmarks of a missing package skipped, with what to install as the reason?"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "test_finetune.py"


@pytest.mark.parametrize("missing", [True, False])
def test_fine_tuning_without_grain_is_skipped(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grain")
    if missing:
        monkeypatch.setitem(sys.modules, "grain", None)
    # pytest skips every test of a module with this `pytestmark`.
    mark = runpy.run_path(str(FILE))["pytestmark"]
    assert (mark.name, mark.args) == ("skipif", (missing,))
    assert mark.kwargs["reason"] == "fine-tuning needs grain: pip install 'vit-ref[finetune]'"
