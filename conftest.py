"""Strict settings and the header of every run, for tests and benchmarks."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import Phase, settings
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

# `--hypothesis-profile NAME` chooses the number of configurations for each property. Each configuration has shapes of
# its own and is compiled, so there are few, no deadline, and no shrinking except in the thorough profile. Every run
# draws
# new ones; `--hypothesis-seed` repeats a run. The parent is named because in CI hypothesis uses one with fixed draws.
AS_DRAWN = (Phase.explicit, Phase.reuse, Phase.generate)
for name, examples, phases in (
    ("quick", 3, AS_DRAWN),
    ("ci", 25, AS_DRAWN),
    ("thorough", 250, tuple(Phase)),
    ("thousand", 1000, AS_DRAWN),
):
    settings.register_profile(
        name,
        settings.get_profile("default"),
        max_examples=examples,
        phases=phases,
        deadline=None,
        derandomize=False,
        print_blob=True,
    )
settings.load_profile("quick")

# These make XLA compile a small model on a CPU faster, if LLVM's optimisations are left out, too. jax 0.12 no longer
# has the first.
QUICK: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
QUICKLY = "jax_disable_most_optimizations"
# Set if a test started this run, in its own process or in another one.
INNER = "PYTEST_CURRENT_TEST" in os.environ
# A worker drops what it compiled once it holds more than this. Until then single operations serve module after module,
# because tracing and loading them again takes seconds.
MOST_BYTES = 3 * 2**29
# Beginnings of the ids of embedded cases whose gradients are not compiled as users do.
GRADIENTS_COMPILED_QUICKLY = ("hard-tokens-", "no-qkv-bias-", "one-head-", "pooler-")
TESTS = Path(__file__).parent / "tests"
# The folder of a test is its marker.
FOLDERS = {
    "bench": "benchmarks time what their options say; no test asserts a time",
    "cache": "what a run keeps on disk is never stale, damaged or in the way",
    "candidates": "candidates of others are verified, and a wrong one is reported",
    "compare": "the same gates compare any two implementations, whatever they are written in",
    "consistency": "all ways of running and differentiating the model agree",
    "finetune": "a run does what its recipe says, whatever stops it",
    "house": "imports point down, rooms import no more than they need, docstrings begin as they should",
    "model": "the model alone does what its configuration says",
    "mutants": "a deliberate bug is detected, and named where it is",
    "parity": "gates, precisions and traces do what the suite says",
    "porting": "the weight map, checkpoints and bad input",
    "preprocessing": "images become what the reference's image processor makes of them",
    "properties": "what holds for every valid configuration",
    "references": "the references agree with each other",
    "report": "a report says what the checks found",
    "sharding": "many devices hold their own part of a model, and compute what one computes",
    "testing": "pytest's options do what they say",
    "training": "training steps, dropout and one-batch overfitting follow the reference",
}
# Markers that a test has because of its file.
MARKERS = {
    "optimised": "jax compiles what users run; most other tests leave out LLVM's optimisations",
    "no_cover": "pytest-cov does not measure it, because it runs the package with a fault in it",
    "torch": "needs PyTorch, which the extra of that name installs",
    "hub": "needs the Hugging Face hub",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    # Not for benchmarks/: pytest would take the value of an option that it does not know yet for a path.
    group = parser.getgroup("vit_ref benchmarks")
    group.addoption(
        "--size",
        metavar="SIZE",
        action="append",
        default=[],
        help="size of the model, such as Ti/16 or B/16; repeatable",
    )
    group.addoption("--batch", type=int, metavar="N", action="append", default=[], help="images in a batch; repeatable")
    group.addoption(
        "--bench-precision", metavar="NAME", action="append", default=[], help="float32, mixed, ...; repeatable"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A formula that needs jax's implicit promotion breaks with another dtype.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Not in pyproject.toml: with `--checkpoint DIR` outside the checkout, pytest would look for its configuration above
    # that directory and find none.
    for name, question in (FOLDERS | MARKERS).items():
        config.addinivalue_line("markers", f"{name}: {question}")
    config.addinivalue_line("filterwarnings", "error")
    # If another process is just writing an entry, jax compiles the function itself.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry")
    config.option.strict_markers = True
    config.option.strict_config = True
    if config.getoption("benchmark_only", False):
        return
    environment = pytest.MonkeyPatch()  # which worker processes, and programs that tests start, have from this process
    environment.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # No test depends on what an earlier run left on the disk. Tests of the cache name a directory of their own.
    environment.setenv("VIT_REF_CACHE", "off")
    _compile_quickly(environment)
    config.add_cleanup(environment.undo)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        _keep_compiled(config, environment)


def pytest_collection_finish() -> None:
    _set_aside_what_lives()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks a test before `-m` selects. The conftest of the package's own suite marks the tests of that suite."""
    if item.path.is_relative_to(TESTS):
        item.add_marker(item.path.relative_to(TESTS).parts[0])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Settles how jax compiles, before any fixture."""
    quickly = not _compiles_as_users_do(item)
    if not item.config.getoption("benchmark_only", False) and jax.config.values[QUICKLY] != quickly:
        jax.config.update(QUICKLY, quickly)
        jax.clear_caches()  # otherwise jax would go on with what it compiled the other way


def _compiles_as_users_do(item: pytest.Item) -> bool:
    """Says whether this test measures rounding, which depends on how jax compiles: the suite, and tests with a marker.

    LLVM's optimisations take two fifths of the time to compile a small model, and most tests compare two programs. An
    inner run looks for a fault, and not for rounding. Behaviour is checked in float64, whose rounding no gate sees. A
    gradient takes three times as long to compile as a forward pass, so one case alone is compiled so. The others differ
    from it in a formula or in the tokens, whose rounding shows without LLVM's optimisations, too.
    """
    if INNER:
        return False
    asked, case = getattr(item, "fixturenames", ()), item.name.partition("[")[2]
    if "parity" in asked or ("gradients" in asked and not case.startswith(GRADIENTS_COMPILED_QUICKLY)):
        return True
    return item.get_closest_marker("optimised") is not None


@pytest.hookimpl(trylast=True)  # after the module's fixtures have ended
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops what was compiled, between modules, once it has grown: it comes to gigabytes in each process."""
    if nextitem is None or nextitem.path == item.path:
        return
    if _resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        if not INNER:  # it would not set them aside again
            gc.unfreeze()
        gc.collect()
        from vit_ref.verify.compare.memory import return_freed_memory

        # Otherwise the worker would look as large as before, and drop what it compiled after every module from then on.
        return_freed_memory()
    _set_aside_what_lives()


def _resident_bytes() -> float:
    """Returns the memory that this process holds, in bytes; infinity if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return math.inf


def _set_aside_what_lives() -> None:
    """Removes long-lived objects from the garbage collector, because tests and the package run it hundreds of times.

    Each time it would take a third of a second for all that is imported and compiled. An inner run does not, because
    its objects would never be freed.
    """
    if not INNER:
        gc.collect()
        gc.freeze()


def _compile_quickly(environment: pytest.MonkeyPatch) -> None:
    """Adds `QUICK` to jax's compile options if `jax_disable_most_optimizations` is on.

    jax has no setting for them. Programs that tests start read the options from VIT_REF_QUICK_XLA_FLAGS. XLA_FLAGS
    itself would change what workers compile for parity.
    """
    known = {name: value for name, value in QUICK.items() if _known(**{name: value})}
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in known.items())
    environment.setenv("VIT_REF_QUICK_XLA_FLAGS", flags)
    get_compile_options = compiler.get_compile_options

    def options(*arguments: Any, **named: Any) -> Any:
        found = get_compile_options(*arguments, **named)
        if jax.config.values[QUICKLY]:
            # An inner run in this process would wrap the wrapped function again.
            found.env_option_overrides = list({**dict(found.env_option_overrides), **known}.items())
        return found

    environment.setattr(compiler, "get_compile_options", options)


def _known(**option: Any) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=option)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _keep_compiled(config: pytest.Config, environment: pytest.MonkeyPatch) -> None:
    """Shares what jax compiles between all processes of this run, because they compile the same references.

    A cache that the environment names is used instead.
    """
    directory = tempfile.mkdtemp(prefix="vit-ref-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    before = {name: jax.config.values[name] for name in jax.config.values if "cache" in name}

    def undo() -> None:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    config.add_cleanup(undo)
    for name, value in (
        ("jax_compilation_cache_dir", directory),
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        environment.setenv(name.upper(), str(value))
        jax.config.update(name, value)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Lets `pytest --benchmark-only` run only the benchmarks, and any other run leave them out."""
    left_out = ("tests", "vit_ref") if config.getoption("benchmark_only", False) else ("benchmarks",)
    return True if any(Path(__file__).parent / each in collection_path.parents for each in left_out) else None


def pytest_report_header() -> list[str]:
    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {package}"

    packages = ", ".join(version(package) for package in ("jax", "flax", "transformers", "numpy", "torch"))
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    precision = jax.config.jax_default_matmul_precision or "the backend's own"  # type: ignore[attr-defined]
    x64 = "on" if jax.config.jax_enable_x64 else "off, on for the oracle alone"  # type: ignore[attr-defined]
    without = [] if find_spec("grain") else ["tests of fine-tuning are left out: pip install 'vit-ref[finetune]'"]
    return [
        f"vit_ref on {packages}",
        f"device: {jax.default_backend()} ({devices}, {platform.machine()});"
        f" default matmul precision: {precision}; x64: {x64}",
        *without,
    ]
