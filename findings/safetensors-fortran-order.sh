#!/usr/bin/env bash
# Guess: `safetensors.numpy.save_file` stores the values of a transposed array, or refuses it as the PyTorch side
#   does.
# Seen: 2026-11-30, safetensors 0.8.0, NumPy 2: it stores the memory of a transposed array under the transposed shape.
#   The file loads without a word, and every value but the diagonal is in another place. Its docstring asks for
#   contiguous arrays; nothing checks that.
# It hurts: a kernel that a script turns from (out, in) to (in, out) with `.T` is transposed in name alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/environment/bin/python" - <<'PYTHON'
import os
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

kernel = np.arange(6.0).reshape(2, 3).T
file = os.path.join(tempfile.mkdtemp(), "kernel.safetensors")
save_file({"kernel": kernel}, file)
loaded = load_file(file)["kernel"]
print("saved", kernel.tolist(), "loaded", loaded.tolist())
holds = loaded.shape == (3, 2) and np.array_equal(loaded, np.arange(6.0).reshape(3, 2))
sys.exit(0 if holds else 3)
PYTHON
