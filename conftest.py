"""Strictness for the whole run, and its header, for tests and benchmarks alike."""

from __future__ import annotations

import gc
import importlib.metadata
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

# `--hypothesis-profile NAME`: on how many configurations a property is tried. Each has shapes of its own and compiles
# anew, hence so few, no deadline, and no shrinking but in the thorough profile: five minutes were seen, over an example
# that was small to begin with. Every run draws others; `--hypothesis-seed` repeats one. The parent is named because
# hypothesis takes another one, with fixed draws, where it finds itself in CI.
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

# XLA compiles a small model on a CPU in half the time with these, if LLVM's optimisations are left out, too. jax 0.12
# no longer has the first.
QUICK: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
# A test started this run, in its own process or in another one.
INNER = "PYTEST_CURRENT_TEST" in os.environ
TESTS = Path(__file__).parent / "tests"
# A test has the name of its folder as a marker.
FOLDERS = {
    "bench": "what is timed is what was asked for; nothing asserts a time",
    "compare": "any two implementations are compared by the same gates, whatever they are written in",
    "candidates": "ports that are not ours are judged, and a wrong one is reported",
    "consistency": "every way of running and differentiating the model agrees with every other",
    "finetune": "a run does what its recipe says, whatever stops it",
    "house": "imports point down, and each room imports no more than it needs",
    "model": "the model by itself",
    "mutants": "a deliberate fault is seen, and named where it is",
    "parity": "the gates, the precisions and the traces do what the suite says of them",
    "porting": "the weight map, checkpoints and bad input",
    "preprocessing": "images become what the reference's image processor makes of them",
    "properties": "what holds for every valid configuration",
    "references": "the references agree with each other",
    "report": "a report says what the checks found",
    "sharding": "many devices hold their own part of a model, and compute what one computes",
    "testing": "pytest's options do what they say",
    "training": "training steps, dropout and one-batch overfitting follow the reference",
}
# A test has these markers because its file says so.
MARKERS = {
    "optimised": "jax compiles as users have it; elsewhere it leaves LLVM's optimisations out, but for parity",
    "torch": "needs PyTorch, which the extra of that name installs",
    "hub": "needs the Hugging Face hub",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    # Not in benchmarks/: of a value that pytest does not know yet it makes a path, and then looks nowhere else.
    group = parser.getgroup("vit_ref benchmarks")
    group.addoption("--size", metavar="SIZE", action="append", default=[], help="as Ti/16 or B/16; repeatable")
    group.addoption("--batch", type=int, metavar="N", action="append", default=[], help="images; repeatable")
    group.addoption(
        "--bench-precision", metavar="NAME", action="append", default=[], help="float32, mixed, ...; repeatable"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A formula that works only because jax promotes silently is one that another dtype breaks.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Here and not in pyproject.toml: with `--checkpoint DIR` outside the checkout, pytest looks for its configuration
    # from there up and finds none.
    for name, question in (FOLDERS | MARKERS).items():
        config.addinivalue_line("markers", f"{name}: {question}")
    config.addinivalue_line("filterwarnings", "error")
    # Of what another process is writing just now: jax then compiles it itself.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache entry")
    config.option.strict_markers = True
    config.option.strict_config = True
    if config.getoption("benchmark_only", False):
        return
    environment = pytest.MonkeyPatch()  # which worker processes, and programs that tests start, have from this process
    environment.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    _compile_quickly(environment)
    config.add_cleanup(environment.undo)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        _keep_compiled(config, environment)


def pytest_collection_finish() -> None:
    _set_aside_what_lives()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks a test before `-m` selects. The parity suite of the package marks its tests by its own conftest."""
    if item.path.is_relative_to(TESTS):
        item.add_marker(item.path.relative_to(TESTS).parts[0])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Settles how jax compiles, before any fixture of any scope does.

    LLVM's optimisations are two fifths of the time that compiling a small model takes, and most tests compare what two
    programs compute. Parity, and tests that say so, compile what users run.
    """
    if not item.config.getoption("benchmark_only", False):
        optimised = any(item.get_closest_marker(name) for name in ("parity", "optimised"))
        jax.config.update("jax_disable_most_optimizations", not optimised)


@pytest.hookimpl(trylast=True)  # after the module's fixtures have ended
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a module's tests compiled serves few others, and adds up to gigabytes in each process."""
    if nextitem is not None and nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
        _set_aside_what_lives()


def _set_aside_what_lives() -> None:
    """Spares the garbage collector half a million objects, most of them of modules, that live as long as the process.

    Tests and the package ask it to collect hundreds of times. An inner run keeps away: what it made would stay.
    """
    if not INNER:
        gc.freeze()


def _compile_quickly(environment: pytest.MonkeyPatch) -> None:
    """Adds `QUICK` to jax's compile options wherever `jax_disable_most_optimizations` is on.

    jax has no setting for it. Programs that tests start find the options in VIT_REF_QUICK_XLA_FLAGS: XLA_FLAGS itself
    would change what workers compile for parity.
    """
    known = {name: value for name, value in QUICK.items() if _known(**{name: value})}
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in known.items())
    environment.setenv("VIT_REF_QUICK_XLA_FLAGS", flags)
    get_compile_options = compiler.get_compile_options

    def options(*arguments: Any, **named: Any) -> Any:
        found = get_compile_options(*arguments, **named)
        if jax.config.values["jax_disable_most_optimizations"]:
            # An inner run in this process wraps the wrapped function again.
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
    """What jax compiles serves all processes of this run: a quarter of the time of `-m mutants`, say.

    The same references are compiled for test after test, in every worker. Where the environment names a cache, that is
    taken.
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
    """`pytest --benchmark-only` runs the benchmarks and nothing else; any other run leaves them out."""
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
