#!/usr/bin/env bash
# Guess: `mx.exp` of a float64 array on the CPU errs by 1e-16, as its products do.
# Seen: 2026-11-30, mlx 0.32.4 on a CPU under Linux: `mx.exp` errs by 1e-7 relatively and softmax by 1e-8 of a unit,
#   both with dtype float64, while a matrix product errs by 1e-16.
# It hurts: a float64 attention in MLX is no oracle, although every array says float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' numpy==2.4.6
"$folder/environment/bin/python" - <<'PYTHON'
import sys

import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
x = np.random.default_rng(0).standard_normal((64, 64))
array = mx.array(x, dtype=mx.float64)
exponential, product = mx.exp(array), array @ array
e = float(np.max(np.abs(np.asarray(exponential) / np.exp(x) - 1)))
p = float(np.max(np.abs(np.asarray(product) - x @ x)))
print(f"{exponential.dtype}: exp errs by {e:.1e} relatively, a product by {p:.1e}")
holds = exponential.dtype == mx.float64 and e > 1e-9 and p < 1e-12
sys.exit(0 if holds else 3)
PYTHON
