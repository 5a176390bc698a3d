#!/usr/bin/env bash
# Guess: `jax.nn.dot_product_attention` on float64 queries, keys and values errs by 1e-16.
# Seen: 2026-11-30, jax 0.12.0.1 on a CPU: the relative RMS error is 7e-8, although output and inputs are float64. The
#   softmax inside is computed in float32. flax.nnx's attention calls it. PyTorch's, ONNX Runtime's and PaddlePaddle's
#   fused attention err by 4e-16 on the same numbers.
# It hurts: a candidate that calls it fails a comparison in float64, and its formula is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.12.0.1
"$folder/environment/bin/python" - <<'PYTHON'
import sys

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
draw = np.random.default_rng(0)
query, key, value = (draw.standard_normal((2, 37, 3, 16)) for _ in range(3))
scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 4
weights = np.exp(scores - scores.max(-1, keepdims=True))
truth = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
result = jax.nn.dot_product_attention(*map(jax.numpy.asarray, (query, key, value)))
error = float(np.sqrt(np.mean((np.asarray(result) - truth) ** 2) / np.mean(truth**2)))
print(f"{result.dtype}: relative RMS error {error:.1e}")
holds = result.dtype == np.float64 and 1e-9 < error < 1e-6
sys.exit(0 if holds else 3)
PYTHON
