"""Runs of `vit-ref finetune` on the built-in images, in processes of their own where something stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from click.testing import CliRunner

from vit_ref.cli.commands import main

# Start the command as a module, so that a test need not know where the script was installed.
_PROGRAM = "from vit_ref.cli.commands import main; main(prog_name='vit-ref')"
# 512 images give eight steps an epoch, each a fraction of a second.
OPTIONS = (
    *("--epochs", "2", "--batch-size", "64", "--optimizer", "adamw", "--learning-rate", "0.003", "--dropout", "0.1"),
    *("--grad-clip", "1", "--no-plots"),
)
STEPS = 16


class Runner:
    """Starter of `vit-ref finetune` in a directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def start(
        self, out: str, *options: str, devices: int = 1, blocks: int | None = None, measured: bool = True
    ) -> subprocess.Popen:
        """Starts a run with simulated devices. `blocks` of 512 bytes limit the size of any file it writes."""
        # Most of such a run is compilation, which takes less time without LLVM's optimisations.
        quick = os.environ["VIT_REF_QUICK_XLA_FLAGS"]
        flags = f"--xla_force_host_platform_device_count={devices} {quick}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if not measured:
            environment = {name: value for name, value in environment.items() if not name.startswith("COV")}
        where = ["--output-dir", str(self.directory / out)]
        command = [sys.executable, "-c", _PROGRAM, "finetune", *where, *OPTIONS, *options]
        if blocks is not None:
            command = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *command]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, out: str, *options: str, code: int = 0, **options_of_start: Any) -> str:
        """Returns the output of a run, and checks its exit code."""
        process = self.start(out, *options, **options_of_start)
        printed, errors = process.communicate()
        assert process.returncode == code, errors[-3000:]
        return printed + errors

    def here(self, out: str, *options: str) -> str:
        """Returns the output of a run in this process, which has imported everything, and checks its exit code."""
        where = ["--output-dir", str(self.directory / out)]
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            ended = CliRunner().invoke(main, ["finetune", *where, *OPTIONS, *options])
        assert ended.exit_code == 0, ended.output
        return ended.output

    def result(self, out: str) -> tuple[bytes, bytes]:
        """Returns the metrics and the model's tensors, as bytes."""
        run = self.directory / out
        return (run / "metrics.jsonl").read_bytes(), (run / "model" / "model.safetensors").read_bytes()

    def killed(self, out: str, *options: str, lines: int) -> None:
        """Starts a run, and kills it with SIGKILL once its log has this many lines."""
        # A killed process would leave a half-written file of coverage.
        process, log = self.start(out, *options, measured=False), self.directory / out / "metrics.jsonl"
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"
