#!/usr/bin/env bash
# Guess: `mindspore.nn.GELU()` and `mindspore.ops.gelu` have one default form.
# Seen: 2026-11-30, MindSpore 2.10.0 on a CPU: `nn.GELU()` is the tanh form, `ops.gelu(x)` the erf form. They differ
#   by 4.1e-4 at 3.
# It hurts: a person who turns a cell into functions changes the activation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check mindspore==2.10.0 'numpy<2'
"$folder/environment/bin/python" - <<'PYTHON'
import math
import sys

import mindspore as ms
import numpy as np

x = ms.Tensor(np.full(64, 3, np.float32))
erf = 3 * 0.5 * math.erfc(-3 / math.sqrt(2))
differences = [float(value.asnumpy()[0]) - erf for value in (ms.nn.GELU()(x), ms.ops.gelu(x))]
print(f"minus the erf form, at 3: nn.GELU {differences[0]:.1e}, ops.gelu {differences[1]:.1e}")
holds = abs(differences[0] - 4.1e-4) < 2e-5 and abs(differences[1]) < 1e-6
sys.exit(0 if holds else 3)
PYTHON
