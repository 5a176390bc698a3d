"""Is each number found again under the same circumstances, to the last bit, and under no others?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_ref.verify.cache import identity
from vit_ref.verify.cache.shelf import Shelf
from vit_ref.verify.cache.store import Store
from vit_ref.verify.cases import CASES
from vit_ref.verify.gates import Error
from vit_ref.verify.precision import FLOAT64, PRECISIONS

CASE = CASES["rectangular"]
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
PIXELS = np.ones((2, 4, 4, 1), np.float32)
ERRORS = {"x": Error(0.1, 1e-300, 3.7), "y": Error(math.inf, math.inf, reason="not finite")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def shelf(
    store: Store, *, reference="flax", config=CASE.config, tensors=TENSORS, pixels=PIXELS, precision="float32"
) -> Shelf:
    made = Shelf.of(store, reference, repr(config), tensors, foreign=False)
    return made.for_inputs(pixels, PRECISIONS[precision])


def keep(store: Store) -> None:
    shelf(store).keep("reference", ERRORS)
    assert shelf(store).find("reference") == ERRORS


def test_errors_come_back_to_the_last_bit(store) -> None:
    keep(store)
    assert shelf(store).find("reference") == ERRORS
    assert list(shelf(store).find("reference")) == list(ERRORS)
    assert shelf(store).find("oracle") is None


def test_values_come_back_to_the_last_bit(store) -> None:
    rng = np.random.default_rng(0)
    trace = {"x": rng.normal(size=(3, 5)), "scalar": np.array(3.0), "y": rng.normal(size=(4, 2, 7)).transpose(2, 0, 1)}
    shelf(store).keep_trace("forward", trace)
    found = shelf(store).find_trace("forward")
    assert list(found) == list(trace)
    for name, value in trace.items():
        np.testing.assert_array_equal(found[name], value, strict=True)
        assert found[name].strides == value.strides
    assert shelf(store).find_trace("backward") is None


@pytest.mark.parametrize(
    "other",
    [
        {"reference": "torch"},
        {"config": dataclasses.replace(CASE.config, layer_norm_eps=1e-9)},
        {"tensors": {"a": TENSORS["a"], "c": TENSORS["b"]}},
        {"tensors": {"a": TENSORS["a"].reshape(3, 2), "b": TENSORS["b"]}},
        {"tensors": {"a": TENSORS["a"], "b": np.ones(3, np.float64)}},
        {"tensors": {"a": np.nextafter(TENSORS["a"], np.float32(9)), "b": TENSORS["b"]}},
        {"pixels": PIXELS[:1]},
        {"pixels": np.nextafter(PIXELS, np.float32(9))},
        {"precision": "bfloat16"},
        {"precision": "mixed"},
        {"precision": "tensorfloat32"},
    ],
    ids=str,
)
def test_other_arguments_are_another_key(store, other) -> None:
    keep(store)
    assert shelf(store, **other).find("reference") is None


@pytest.mark.parametrize(
    "variable", ["XLA_FLAGS", "OMP_NUM_THREADS", "JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE"]
)
def test_another_environment_is_another_key(store, monkeypatch, variable) -> None:
    keep(store)
    monkeypatch.setenv(variable, "another")
    assert shelf(store).find("reference") is None


def test_another_variable_is_the_same_key(store, monkeypatch) -> None:
    keep(store)
    monkeypatch.setenv("EDITOR", "another")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "another")
    assert shelf(store).find("reference") == ERRORS


def test_another_setting_of_jax_is_another_key(store) -> None:
    keep(store)
    with jax.default_matmul_precision("bfloat16"):
        assert shelf(store).find("reference") is None
    with jax.enable_x64(True):
        assert shelf(store).find("reference") is None
    assert shelf(store).find("reference") == ERRORS


@pytest.mark.parametrize("package", ["jax", "jaxlib", "flax", "transformers", "torch", "numpy", "scipy", "ml_dtypes"])
def test_another_version_is_another_key(store, monkeypatch, package) -> None:
    keep(store)
    version = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "9.9" if name == package else version(name))
    assert shelf(store).find("reference") is None


@pytest.mark.parametrize("what", ["source", "machine"])
def test_another_source_or_processor_is_another_key(store, monkeypatch, what) -> None:
    keep(store)
    monkeypatch.setattr(identity, what, lambda: "another")
    assert shelf(store).find("reference") is None


def test_another_number_of_cores_is_another_key(store, monkeypatch) -> None:
    keep(store)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(977)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 977)
    assert shelf(store).find("reference") is None


def test_the_source_is_read(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(identity.vit_ref, "__file__", str(tmp_path / "__init__.py"))
    seen = set()
    for text in ("x = 1\n", "x = 2\n"):
        (tmp_path / "formula.py").write_text(text)
        seen.add(identity.source.__wrapped__())
    assert len(seen) == 2


def test_narrower_circumstances_are_another_key(store) -> None:
    whole = shelf(store)
    whole.keep("reference", ERRORS)
    assert whole.within("stored", "bfloat16").find("reference") is None


def test_float64_is_another_key_than_what_it_is_called(store) -> None:
    whole = Shelf.of(store, "flax", "", TENSORS)
    whole.for_inputs(PIXELS, FLOAT64).keep("reference", ERRORS)
    assert whole.for_inputs(PIXELS, FLOAT64._replace(products=None)).find("reference") is None


def test_packages_of_accelerators_are_known_by_their_directories(tmp_path: Path, monkeypatch) -> None:
    for name in ("nvidia_cudnn_cu12-9.1.0", "jax_cuda12_plugin-0.10.2", "libtpu-0.1", "jax-0.10.2", "nvidious-1"):
        (tmp_path / f"{name}.dist-info").mkdir()
    (tmp_path / "nvidia_smi").mkdir()
    monkeypatch.setattr(identity.sys, "path", [str(tmp_path), str(tmp_path / "nowhere")])
    found = identity._device_packages.__wrapped__()
    assert found == ["jax_cuda12_plugin-0.10.2", "libtpu-0.1", "nvidia_cudnn_cu12-9.1.0"]
