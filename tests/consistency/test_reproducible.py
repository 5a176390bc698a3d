"""Does the same seed give the same bits in another process?"""

from __future__ import annotations

import os
import subprocess
import sys

# One line for each thing that a seed decides, with a hash of its bytes.
PROGRAM = """
import hashlib, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from vit_ref import VisionTransformer
from vit_ref.verify.cases import CASES

def report(name, tree):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    print(name, digest.hexdigest())

case, seed = CASES["rectangular"], int(sys.argv[1])
pixels = jnp.asarray(case.images())
model = VisionTransformer(case.config, rngs=nnx.Rngs(seed))
model.train()
graph, state = nnx.split(model)

@jax.jit
def train(state, key):
    def loss(state):
        logits = nnx.merge(graph, state)(pixels, rngs=nnx.Rngs(dropout=key))
        return jax.nn.logsumexp(logits, axis=-1).sum(), logits
    return jax.value_and_grad(loss, has_aux=True)(state)

(_, logits), gradient = train(state, jax.random.key(seed))
report("parameters", state)
report("logits with dropout", logits)
report("gradient", gradient)
(_, logits), _ = train(state, jax.random.key(seed + 1))
report("logits with other dropout", logits)
"""


def test_two_processes_agree_to_the_last_bit() -> None:
    # Unless told otherwise, each Python process orders sets and hashes strings differently. Here they surely differ.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "7"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    first, second = (process.communicate()[0].splitlines() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    # The hashes depend on what the seed decides: another dropout gives other logits.
    assert len({line.split()[-1] for line in first}) == len(first) == 4
