#!/usr/bin/env bash
# Guess: `keras.ops.gelu` and `keras.activations.gelu` have one default form.
# Seen: 2026-11-30, Keras 3.15.1 on jax: `keras.ops.gelu(x)` is the tanh form, `keras.activations.gelu(x)` and
#   activation="gelu" are the erf form. They differ by 4.1e-4 at 3.
# It hurts: a layer written with `ops` and one with `activations` differ, and a check at 1e-3 passes both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check keras==3.15.1 jax==0.12.0.1
KERAS_BACKEND=jax "$folder/environment/bin/python" - <<'PYTHON'
import math
import sys

import keras
import numpy as np

x = np.array([3.0], np.float32)
erf = 3 * 0.5 * math.erfc(-3 / math.sqrt(2))
differences = [float(np.asarray(function(x))[0]) - erf for function in (keras.ops.gelu, keras.activations.gelu)]
print(f"minus the erf form, at 3: ops {differences[0]:.1e}, activations {differences[1]:.1e}")
holds = abs(differences[0] - 4.1e-4) < 2e-5 and abs(differences[1]) < 1e-6
sys.exit(0 if holds else 3)
PYTHON
