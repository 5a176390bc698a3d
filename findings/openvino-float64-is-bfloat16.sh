#!/usr/bin/env bash
# Guess: a model whose input, output and product are float64 is computed in float64, or in float32 at worst.
# Seen: 2026-11-30, OpenVINO 2026.4.1, an Intel CPU with AMX: the product of two float64 matrices has a relative RMS
#   error of 5e-3, and its dtype says float64. The plugin computes in bfloat16 where the CPU has it, unless
#   INFERENCE_PRECISION_HINT says otherwise; with the hint f32 the error is 1e-7.
# It hurts: an exported model that serves as the truth is bfloat16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
"$folder/environment/bin/python" - <<'PYTHON'
import sys

import numpy as np
import openvino as ov
from openvino import opset15 as ops

if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    print("not tried: this CPU has no bfloat16")
    sys.exit(2)
draw = np.random.default_rng(0)
arrays = [draw.standard_normal((8, 64)), draw.standard_normal((64, 8))]
truth = arrays[0] @ arrays[1]


def error(hints):
    inputs = [ops.parameter(array.shape, np.float64) for array in arrays]
    model = ov.compile_model(ov.Model([ops.matmul(*inputs, False, False)], inputs), "CPU", hints)
    value = model(arrays)[0]
    return value.dtype, float(np.sqrt(np.mean((value - truth) ** 2) / np.mean(truth**2)))


dtype, default = error({})
_, asked = error({"INFERENCE_PRECISION_HINT": "f32"})
print(f"{dtype}: relative RMS error {default:.1e}; with the hint f32 {asked:.1e}")
holds = dtype == np.float64 and default > 1e-3 and 1e-8 < asked < 1e-6
sys.exit(0 if holds else 3)
PYTHON
