"""How long does a person wait before the first computation: for the import, and for a checkpoint to become a model?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from vit_ref import from_pretrained, save_pretrained
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import Case
from vit_ref.weights.pretrained import build

# The bare interpreter and jax alone give the lower bounds.
IMPORTS = {"nothing": "pass", "jax": "import jax", "flax.nnx": "from flax import nnx", "vit_ref": "import vit_ref"}


@pytest.mark.benchmark(group="import")
@pytest.mark.parametrize("name", IMPORTS)
def test_import(benchmark: Any, name: str) -> None:
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", IMPORTS[name]],), {"check": True}, rounds=5)


@pytest.mark.benchmark(group="checkpoint load, S/16")
def test_load(benchmark: Any, tmp_path: Path) -> None:
    config = ViTConfig.variant("S/16")
    save_pretrained(build(config, OwnCandidate(config, Case("s16", config).checkpoint()).parameters), tmp_path)
    benchmark.extra_info["bytes"] = sum(file.stat().st_size for file in tmp_path.iterdir())
    benchmark(lambda: jax.block_until_ready(nnx.state(from_pretrained(tmp_path))))
