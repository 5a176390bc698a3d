#!/usr/bin/env bash
# Guess: Orbax gives the integer keys of an nnx.List back as integers, in their order.
# Seen: 2026-11-30, orbax-checkpoint 0.12.8, flax 0.12.12: without a target they come back as text, and sorted as
#   text: 0, 1, 10, 11, 2.
# It hurts: code that zips restored blocks with the model's gives block 2 the weights of block 10, once there are
#   eleven blocks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 flax==0.12.12 jax==0.12.0.1
"$folder/environment/bin/python" - <<'PYTHON'
import pathlib
import sys
import tempfile

import orbax.checkpoint as ocp
from flax import nnx


class Model(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(index)) for index in range(12)])


state = nnx.to_pure_dict(nnx.state(Model()))
folder = pathlib.Path(tempfile.mkdtemp(), "saved")
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(folder)
before, after = list(state["blocks"]), list(restored["blocks"])
print("saved", before, "restored", after)
holds = before == list(range(12)) and after == sorted(map(str, range(12)))
sys.exit(0 if holds else 3)
PYTHON
