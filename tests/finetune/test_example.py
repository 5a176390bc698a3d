"""Does the example do what its text says?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"


def test_the_example_learns_what_it_says(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "XLA_FLAGS": os.environ["VIT_REF_QUICK_XLA_FLAGS"]}
    ran = subprocess.run([sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "512 + 128 images of 4 classes" in ran.stdout
    assert "the starting model is right" in ran.stdout
    accuracy = float(re.search(r"best after epoch \d: ([\d.]+)% of 128", ran.stdout)[1])
    assert accuracy > 70  # percent, of four classes
    assert "attention.png batches.png confusion.png curves.png predictions.png schedule.png" in ran.stdout
    (run,) = tmp_path.glob("finetune-*/run")
    assert (run / "model" / "model.safetensors").exists()
