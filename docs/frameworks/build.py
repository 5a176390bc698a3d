"""Writes docs/reference/framework-defaults.md: `python docs/frameworks/build.py`.

Installs each framework's pinned release into a temporary environment, measures it there, and writes the page. Needs the
network, the interpreters that `FRAMEWORKS` names on PATH, and clang for tinygrad. `--measured FILE` keeps the
figures as JSON, and takes them from there if it exists.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from page import write_page

HERE = Path(__file__).parent
PAGE = HERE.parent / "reference" / "framework-defaults.md"
JAX_NEW = ("jax==0.12.0.1", "flax==0.12.12")
# Interpreter, packages, and the adapter of each title: one environment a line.
FRAMEWORKS: tuple[tuple[str, tuple[str, ...], dict[str, str]], ...] = (
    ("python3.11", ("jax==0.10.2", "flax==0.12.8"), {"jax 0.10": "jax_", "flax (nnx) on jax 0.10": "flax_nnx"}),
    ("python3.12", JAX_NEW, {"jax 0.12": "jax_", "flax (nnx) on jax 0.12": "flax_nnx"}),
    ("python3.12", (*JAX_NEW, "equinox==0.13.8"), {"equinox": "equinox"}),
    ("python3.12", (*JAX_NEW, "dm-haiku==0.0.17"), {"haiku": "haiku"}),
    ("python3.12", ("jax==0.12.0.1", "penzai==0.2.5"), {"penzai": "penzai"}),
    ("python3.12", ("jax==0.12.0.1", "keras==3.15.1"), {"Keras 3 on jax": "keras_on_jax"}),
    (
        "python3.11",
        ("torch==2.13.0", "numpy"),
        {"PyTorch, eager": "torch_eager", "PyTorch, compiled": "torch_compiled"},
    ),
    ("python3.11", ("onnx==1.23.2", "onnxruntime==1.32.0"), {"ONNX Runtime": "onnxruntime"}),
    ("python3.11", ("openvino==2026.4.1", "numpy"), {"OpenVINO": "openvino"}),
    ("python3.11", ("mlx[cpu]==0.32.4", "numpy"), {"MLX, on a CPU": "mlx"}),
    ("python3.11", ("paddlepaddle==3.3.1",), {"PaddlePaddle": "paddle"}),
    ("python3.11", ("tinygrad==0.14.0", "numpy"), {"tinygrad": "tinygrad"}),
    ("python3.11", ("mindspore==2.10.0", "numpy<2"), {"MindSpore": "mindspore"}),
)


def measure_all() -> dict[str, Any]:
    """Returns the figures of every framework, by its title, in the order of the table."""
    figures: dict[str, Any] = {}
    for interpreter, packages, adapters in FRAMEWORKS:
        found = shutil.which(interpreter)
        if found is None:
            raise SystemExit(f"{interpreter} is not on PATH: {', '.join(adapters)} needs it")
        with tempfile.TemporaryDirectory(prefix="framework-") as folder:
            subprocess.run([found, "-m", "venv", folder], check=True)
            python = str(Path(folder, "bin", "python"))
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            for title, adapter in adapters.items():
                print(title, file=sys.stderr, flush=True)
                done = subprocess.run(
                    [python, str(HERE / "measure.py"), adapter],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                )
                figures[title] = json.loads(done.stdout.splitlines()[-1])
    return figures


def name_processor() -> str:
    """Names the CPU, because vector code differs between processors."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main() -> None:
    """Measures, unless the caller brings figures, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, metavar="FILE", help="JSON of the figures, read if it exists")
    path = parser.parse_args().measured
    if path is not None and path.exists():
        measured = json.loads(path.read_text(encoding="utf-8"))
    else:
        start = time.monotonic()
        figures = measure_all()
        measured = {
            "date": datetime.date.today().isoformat(),
            "processor": name_processor(),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "figures": figures,
        }
        if path is not None:
            path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(write_page(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
