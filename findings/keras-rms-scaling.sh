#!/usr/bin/env bash
# Guess: `LayerNormalization(rms_scaling=True)` divides by the root mean square, as RMSNorm does.
# Seen: 2026-11-30, Keras 3.15.1: it divides by the standard deviation, about a mean that it does not subtract. On
#   rows of mean 3 and deviation 1 the values are three times as large as RMSNorm's.
# It hurts: a port of a model with RMSNorm is wrong by a factor that depends on the token, and near right where means
#   are small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check keras==3.15.1 jax==0.12.0.1
KERAS_BACKEND=jax "$folder/environment/bin/python" - <<'PYTHON'
import sys
import warnings

import keras
import numpy as np

warnings.simplefilter("ignore")  # newer releases may announce that the argument goes
x = (np.random.default_rng(0).standard_normal((4, 64)) + 3).astype(np.float32)
value = np.asarray(keras.layers.LayerNormalization(rms_scaling=True, epsilon=1e-12)(x))
by_deviation = float(np.abs(value * x.std(-1, keepdims=True) / x - 1).max())
by_rms = float(np.abs(value * np.sqrt((x**2).mean(-1, keepdims=True)) / x - 1).max())
print(f"off x / deviation by {by_deviation:.1e}, off x / rms by {by_rms:.1e}")
holds = by_deviation < 1e-4 and by_rms > 1
sys.exit(0 if holds else 3)
PYTHON
