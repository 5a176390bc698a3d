#!/usr/bin/env bash
# Guess: MindSpore's bicubic `interpolate`, whose arguments are PyTorch's, computes PyTorch's values (coefficient
#   -0.75, edges repeated).
# Seen: 2026-11-30, MindSpore 2.10.0 on a CPU: it is the kernel of coefficient -0.5 with what lies outside left out,
#   as jax's resize, to 1e-7. It differs from PyTorch's values by several hundredths.
# It hurts: position embeddings that it resizes are not those that a PyTorch checkpoint was trained with.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check mindspore==2.10.0 'numpy<2'
"$folder/environment/bin/python" - <<'PYTHON'
import sys

import mindspore as ms
import numpy as np


def matrix(size, new_size, a, clamp):
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    positions = np.arange(-4, size + 4)
    d = np.abs(positions[None] - centres[:, None])
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0))
    if clamp:
        result = np.zeros((new_size, size))
        np.add.at(result.T, np.clip(positions, 0, size - 1), weights.T)
    else:
        result = weights[:, 4 : size + 4]
    return result / result.sum(-1, keepdims=True)


image = np.random.default_rng(0).standard_normal((7, 9)).astype(np.float32)
value = ms.ops.interpolate(ms.Tensor(image[None, None]), size=(14, 18), mode="bicubic").asnumpy()[0, 0]
errors = []
for a, clamp in ((-0.75, True), (-0.5, False)):
    truth = matrix(7, 14, a, clamp) @ image @ matrix(9, 18, a, clamp).T
    errors.append(float(np.sqrt(np.mean((value - truth) ** 2) / np.mean(truth**2))))
print(f"off PyTorch's bicubic by {errors[0]:.1e}, off -0.5 with edges left out by {errors[1]:.1e}")
holds = errors[0] > 1e-2 and errors[1] < 1e-5
sys.exit(0 if holds else 3)
PYTHON
