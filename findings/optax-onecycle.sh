#!/usr/bin/env bash
# Guess: `optax.cosine_onecycle_schedule(100, 1.0)` gives PyTorch's OneCycleLR with the same peak and number of steps,
#   to rounding.
# Seen: 2026-11-30, optax 0.2.8, torch 2.13.0: both rise from 0.04 for 30 % of the steps, but PyTorch peaks at step 29
#   and ends at 4e-6, optax peaks at step 30 and ends above 5e-4. They differ by up to 0.03 on the way.
# It hurts: a training curve that has to match is off from the second step on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 torch==2.13.0 numpy==2.4.6
"$folder/environment/bin/python" - <<'PYTHON'
import sys
import warnings

import numpy as np
import optax
import torch

warnings.simplefilter("ignore")
schedule = optax.cosine_onecycle_schedule(100, 1.0)
of_optax = np.array([float(schedule(step)) for step in range(100)])
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100)
of_torch = []
for step in range(100):
    of_torch.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    if step < 99:
        scheduler.step()
of_torch = np.array(of_torch)
difference = float(np.abs(of_optax - of_torch).max())
peaks = int(of_torch.argmax()), int(of_optax.argmax())
print(f"peaks at steps {peaks}, last {of_torch[-1]:.1e} and {of_optax[-1]:.1e}, at most {difference:.3f} apart")
holds = peaks == (29, 30) and difference > 0.01
sys.exit(0 if holds else 3)
PYTHON
