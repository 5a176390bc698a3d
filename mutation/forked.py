"""Runs `cosmic-ray exec` in forks of one process that has imported the libraries, which takes seconds a mutation.

Usage: python mutation/forked.py CONFIG SESSION. Runs every mutation of the session without a result, and those that
survived before. Prints the score and every survivor.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
import time

# Imported for the children. Nothing here may start a jax backend, because a backend does not survive a fork.
import flax.linen
import flax.nnx  # noqa: F401
import hypothesis.extra.numpy  # noqa: F401
import jax.numpy  # noqa: F401
import pytest
import transformers.models.vit.modeling_flax_vit  # noqa: F401
from cosmic_ray.config import load_config
from cosmic_ray.mutating import _make_diff, use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult


def passes(stages: list[list[str]], timeout: float) -> tuple[bool, str]:
    """Tells whether pytest passes with each of these arguments, in forks, and returns the end of its output.

    A stage that exceeds the time limit fails. After the first failure the remaining stages are not run.
    """
    output = ""
    for arguments in stages:
        with tempfile.TemporaryFile() as written:
            child = os.fork()
            if child == 0:
                os.dup2(written.fileno(), 1)
                os.dup2(written.fileno(), 2)
                signal.alarm(int(timeout))  # ends the child
                outcome = pytest.main(arguments)
                sys.stdout.flush()  # os._exit leaves the summary, which names the test, in the buffer
                os._exit(outcome)
            status = os.waitpid(child, 0)[1]
            written.seek(0)
            output = written.read().decode(errors="replace")[-4000:]
        if status:
            return False, output if os.WIFEXITED(status) else f"{output}\nFAILED at {timeout:.0f} s\n"
    return True, output


def run(item: WorkItem, stages: list[list[str]], timeout: float) -> WorkResult:
    """Returns the result of one mutation, which is in its file while the tests run."""
    (mutation,) = item.mutations
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    with use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
        passed, output = passes(stages, timeout)
    return WorkResult(
        WorkerOutcome.NORMAL,
        output,
        TestOutcome.SURVIVED if passed else TestOutcome.KILLED,
        "\n".join(_make_diff(before, after, mutation.module_path)),
    )


def killer(result: WorkResult) -> str:
    """Returns the test that failed first, from pytest's summary. A module that cannot be imported fails before any."""
    lines = (result.output or "").splitlines()
    return next((line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR "))), "an exit")


def main(config_path: str, session: str) -> None:
    """Runs a session."""
    sys.dont_write_bytecode = True  # two mutations within a second would share it
    config = load_config(config_path)
    stages = [shlex.split(command)[1:] for command in config.test_command.split("&&")]
    passed, output = passes(stages, config.timeout)
    if not passed:
        sys.exit(f"the tests fail without any mutation:\n{output}")
    with use_db(session, WorkDB.Mode.open) as db:
        again = [item for item, result in db.completed_work_items if result.test_outcome == TestOutcome.SURVIVED]
        items = [*db.pending_work_items, *again]
        for count, item in enumerate(items, start=1):
            started = time.monotonic()
            result = run(item, stages, config.timeout)
            db.set_result(item.job_id, result)
            (mutation,) = item.mutations
            outcome = "survived" if result.test_outcome == TestOutcome.SURVIVED else f"killed, {killer(result)}"
            print(
                f"{count}/{len(items)} line {mutation.start_pos[0]}, {mutation.operator_name}: {outcome},"
                f" {time.monotonic() - started:.1f} s",
                flush=True,
            )
        results = [result for _, result in db.completed_work_items]
    survivors = [result for result in results if result.test_outcome == TestOutcome.SURVIVED]
    print("\n\n".join(result.diff or "" for result in survivors))
    skipped = sum(result.worker_outcome == WorkerOutcome.SKIPPED for result in results)
    tried = len(results) - skipped
    killed = tried - len(survivors)
    print(f"{killed} of {tried} killed ({killed / tried:.1%}), {len(survivors)} alive, {skipped} skipped")


if __name__ == "__main__":
    main(*sys.argv[1:])
