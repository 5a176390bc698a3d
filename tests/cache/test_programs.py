"""Does jax find its compiled programs again, and never a damaged one?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
from vit_ref.verify.cache.programs import keeping_programs
from vit_ref.verify.cache.store import Store
before = dict(jax.config.values)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
place = pathlib.Path(sys.argv[1])
with keeping_programs(Store(place)), keeping_programs(Store(place / "inner")):
    out = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.arange(12.0).reshape(3, 4))
print(events.count("cache_hits"), events.count("cache_misses"), out.tobytes().hex())
assert jax.config.values == before
if not jax.config.jax_compilation_cache_dir:
    events.clear()
    jax.jit(lambda x: jnp.cos(x))(jnp.arange(5.0))
    assert not {"cache_hits", "cache_misses"} & set(events)
"""


def run(place: Path, **variables: str) -> tuple[int, int, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment = {**inherited, "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", PROGRAM, str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    hits, misses, out = done.stdout.split()
    return int(hits), int(misses), out


def programs(place: Path) -> list[Path]:
    return sorted((place / "entries").glob("programs-*"))


def test_a_second_process_compiles_nothing_but_what_was_damaged(tmp_path) -> None:
    hits, misses, out = run(tmp_path)
    entries = programs(tmp_path)
    assert hits == 0
    assert misses == len(entries) >= 3
    assert programs(tmp_path / "inner") == []  # a verification within another one uses the cache of that

    whole, other = entries[0].read_bytes(), entries[1].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    entries[0].write_bytes(flipped)
    entries[1].write_bytes(other[: len(other) // 2])
    entries[2].write_bytes(whole)  # another program's
    assert run(tmp_path) == (misses - 3, 3, out)
    assert run(tmp_path) == (misses, 0, out)  # they were replaced


def test_a_cache_of_the_callers_own_wins(tmp_path) -> None:
    own = tmp_path / "own"
    run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(own), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list(own.glob("*-cache"))
    assert programs(tmp_path / "ours") == []


def test_no_cache_is_made_if_the_caller_switched_jaxs_off(tmp_path) -> None:
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[:2] == (0, 0)
    assert programs(tmp_path) == []


def test_without_jaxs_interface_a_run_goes_on_and_says_so(tmp_path) -> None:
    hidden = 'import sys; sys.modules["jax._src.compilation_cache_interface"] = None'
    command = [sys.executable, "-c", f"import jax\n{hidden}\n{PROGRAM}", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("0 0 ")
    assert "takes no cache of compiled programs: this run compiles all of them" in done.stderr
    assert programs(tmp_path) == []
