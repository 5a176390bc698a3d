"""Is each precision what its name says, for reference and candidate, and does the report say when a device differs?"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from jax.typing import DTypeLike

import vit_ref.testing.plugin
from tests.helpers.synthetic_reports import measured, parity, ported
from vit_ref.errors import InputError
from vit_ref.verify import environment
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.compare import objectives
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.environment import notes, products
from vit_ref.verify.gates import ALLOWANCES, SEMANTIC_RMS, error
from vit_ref.verify.precision import FLOAT64, PRECISIONS, Precision, resolve_precision
from vit_ref.verify.references.flax_vit import FlaxViTReference
from vit_ref.verify.report import summary, table, to_html, to_json
from vit_ref.verify.rounding import MULTIPLIED
from vit_ref.verify.session import Session

TWO_BLOCKS = CASES["rectangular"]
# All blocks compute in one precision, and a second one takes as long again to compile.
CASE = Case("one-block", dataclasses.replace(TWO_BLOCKS.config, num_hidden_layers=1))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def own() -> OwnCandidate:
    return OwnCandidate(CASE.config, CASE.checkpoint())


@pytest.mark.parametrize("given", ["mixed", np.float16, jnp.bfloat16, np.dtype("float32"), PRECISIONS["mixed"]])
def test_a_precision_is_found_by_its_name_or_its_dtype(given: Any) -> None:
    expected = given if isinstance(given, str) else given.name if isinstance(given, Precision) else np.dtype(given).name
    assert resolve_precision(given) is PRECISIONS[expected]


@pytest.mark.parametrize("given", ["int8", "brain", np.float64, "float64"])
def test_an_unknown_precision_is_one_line(given: Any) -> None:
    with pytest.raises(
        InputError, match=r"^precision is '[a-z0-9]+': known are float32, tensorfloat32, bfloat16, mixed"
    ):
        resolve_precision(given)


def test_every_precision_has_a_gate_and_an_option() -> None:
    assert {precision.dtype.name for precision in PRECISIONS.values()} == set(ALLOWANCES)
    choices = re.search(
        r'"--precision".*?choices=\((.*?)\)', Path(vit_ref.testing.plugin.__file__).read_text(), re.DOTALL
    )
    assert choices and re.findall(r"\w+", choices[1]) == list(PRECISIONS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None, str]]:
    """Records who ran in which dtype, with which precision of products and with parameters of which dtype."""
    runs: list[tuple[str, str, str | None, str]] = []

    def watch(kind: type, stored: Callable[[Any], Any]) -> None:
        trace = kind.trace

        def watched(self: Any, pixels: Any, precision: Precision, *rest: Any, **named: Any) -> Trace:
            with precision.active():
                asked = jax.config.jax_default_matmul_precision
            runs.append((self.name, precision.dtype.name, asked, str(np.dtype(stored(self)))))
            return trace(self, pixels, precision, *rest, **named)

        monkeypatch.setattr(kind, "trace", watched)

    watch(OwnCandidate, lambda candidate: candidate.stored or np.float32)
    watch(FlaxViTReference, lambda reference: jax.tree.leaves(reference.params)[0].dtype)
    return runs


@pytest.mark.parametrize(
    ("name", "dtype", "products", "stored"),
    [
        ("float32", "float32", "float32", "float32"),
        ("tensorfloat32", "float32", "tensorfloat32", "float32"),
        ("mixed", "bfloat16", None, "float32"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("float16", "float16", None, "float32"),
    ],
)
def test_reference_and_candidate_run_in_one_precision(
    name: str, dtype: str, products: str | None, stored: str, seen: list[tuple[str, str, str | None, str]]
) -> None:
    report = Session(CASE.config, CASE.checkpoint(), CASE.images(), own(), name, title="alike").forward()
    assert report.passed and report.precision == name
    assert {run[0]: run[1:] for run in seen if run[1] != "float64"} == dict.fromkeys(
        ("FlaxViT", "vit_ref"), (dtype, products, stored)
    )
    # A run with rounded parameters has its own oracle; formulas are compared with the checkpoint's parameters.
    oracles = {run[3] for run in seen if run[:2] == ("FlaxViT", "float64")}
    assert oracles == {"float32", stored}
    assert [run[3] for run in seen if run[:2] == ("vit_ref", "float64")] == ["float32"]


@pytest.mark.optimised  # otherwise two programs round differently, though their parameters are the same
def test_stored_parameters_are_rounded_in_every_precision() -> None:
    """Compares with a checkpoint that is rounded: a declared reference that stores bfloat16 gives the float64 truth."""
    plain, narrow = own(), own().storing(PRECISIONS["bfloat16"])
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow._ready(BFLOAT16)[0])} == {BFLOAT16}
    source = CASE.checkpoint()
    rounded = OwnCandidate(
        CASE.config, dataclasses.replace(source, tensors=PRECISIONS["bfloat16"].rounded(source.tensors))
    )
    expected, actual = rounded.trace(CASE.images(), FLOAT64), narrow.trace(CASE.images(), FLOAT64)
    assert all((expected[site] == actual[site]).all() for site in expected)
    assert plain.stored is None


def test_a_wrong_formula_fails_in_bfloat16_too() -> None:
    """Each block alone is compared with the parameters that it has, so only the wrong block is wrong."""
    case, source = TWO_BLOCKS, TWO_BLOCKS.checkpoint()
    wrong = OwnCandidate(dataclasses.replace(case.config, hidden_act="gelu_new"), source)
    report = Session(case.config, source, case.images(), wrong, "bfloat16", title="tanh").forward()
    assert report.semantic_failures[0].site == "block.0.mlp.hidden"
    alone = {result.site: result.alone for result in report.results}
    assert alone["block.1.attn.out"].rms <= SEMANTIC_RMS < alone["block.1.mlp.out"].rms


@pytest.mark.parametrize("implementation", [own, lambda: FlaxViTReference(CASE.config, CASE.checkpoint().tensors)])
def test_float64_products_are_exact_whatever_the_setting(implementation: Callable[[], Any]) -> None:
    plain = implementation().trace(CASE.images(), FLOAT64)
    # A CPU obeys this setting: without the fix the logits would be off by 4e-3.
    with jax.default_matmul_precision("BF16_BF16_F32"):
        found = implementation().trace(CASE.images(), FLOAT64)
    assert max(error(found[site], plain[site]).rms for site in plain) <= SEMANTIC_RMS


def rounding(to: str) -> Callable[[Array, Array], Array]:
    """Makes products of rounded operands, as on another device."""
    rounded = MULTIPLIED[to]
    return lambda left, right: jnp.asarray(rounded(np.asarray(left)) @ rounded(np.asarray(right)))


def cut(left: Array, right: Array) -> Array:
    """Cuts operands off after TF32's ten bits, as tensor cores may."""
    left, right = ((np.asarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (left, right))
    return jnp.asarray(left @ right)


@pytest.mark.parametrize(
    ("multiply", "kind"),
    [
        (jnp.matmul, "float32"),
        (rounding("ten bits of mantissa (TF32, float16)"), "tensorfloat32"),
        (cut, "tensorfloat32"),
        (rounding("bfloat16"), "bfloat16"),
    ],
    ids=["this-device", "tf32", "tf32-cut", "bfloat16"],
)
def test_the_devices_products_are_found_by_measuring(multiply: Any, kind: str) -> None:
    assert products(multiply) == kind


def summing(left: Array, right: Array) -> Array:
    """Rounds each sum of a product, as a device may that sums in half precision."""
    total = np.zeros((len(left), right.shape[1]), left.dtype)
    wide = np.asarray(left, np.float32), np.asarray(right, np.float32)
    for k in range(right.shape[0]):
        total = (total.astype(np.float32) + wide[0][:, k : k + 1] * wide[1][k]).astype(left.dtype)
    return jnp.asarray(total)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_the_dtype_of_the_sums_is_found_by_measuring(dtype: type) -> None:
    name = np.dtype(dtype).name
    assert products(dtype=dtype) == f"{name}, summed in float32"
    assert products(summing, dtype) == f"{name}, summed in {name}"


@pytest.mark.parametrize("setting", ["BF16_BF16_F32", "BF16_BF16_F32_X3", "bfloat16", "tensorfloat32"])
def test_on_a_cpu_a_setting_that_rounds_nothing_is_not_believed(setting: str) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("another device may round")
    with jax.default_matmul_precision(setting):
        found = environment.environment(PRECISIONS["float32"])
    assert found["default matmul precision"] == f"{setting}: float32"
    assert found["products"] == "float32" and "note" not in found


def test_a_setting_that_the_device_refuses_is_named() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("another device may accept it")
    with jax.default_matmul_precision("TF32_TF32_F32"):
        found = environment.environment(PRECISIONS["float32"])
    assert found["default matmul precision"] == "TF32_TF32_F32: refused by this cpu"
    assert found["note"].startswith("products are refused by this cpu by default (jax_default_matmul_precision is")
    # Half precision leaves the setting as it is.
    with jax.default_matmul_precision("TF32_TF32_F32"):
        assert environment.environment(PRECISIONS["bfloat16"])["products"] == "refused by this cpu"


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("float32", "float32"),
        ("tensorfloat32", "float32 (asked tensorfloat32: this cpu rounds nothing)"),
        ("bfloat16", "bfloat16, summed in float32"),
        ("mixed", "bfloat16, summed in float32"),
        ("float16", "float16, summed in float32"),
    ],
)
def test_a_cpus_products_are_named_in_every_precision(name: str, made: str, pytestconfig: pytest.Config) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("another device may round")
    assert environment.environment(PRECISIONS[name])["products"] == made
    options = pytestconfig.option
    before, options.precision = options.precision, [name]
    try:
        (line,) = vit_ref.testing.plugin.pytest_report_header(pytestconfig)
    finally:
        options.precision = before
    assert line == f"{'warning: ' * (name == 'tensorfloat32')}{name}: products are {made}"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """Returns `device(default, {asked: made})`: the products by default, and those for each requested precision."""

    def install(default: str, made: dict[str, str]) -> None:
        def found(dtype: DTypeLike = np.float32) -> str:
            setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
            return made.get(setting, default) if dtype == np.float32 else f"{np.dtype(dtype)}, summed in float32"

        monkeypatch.setattr(environment, "products", found)

    return install


CPU = "float32", {}
GPU = "tensorfloat32", {"float32": "float32", "highest": "float32"}
TPU = "bfloat16", {"float32": "float32", "tensorfloat32": "tensorfloat32"}


@pytest.mark.parametrize(
    ("kind", "setting", "precision", "said"),
    [
        (CPU, None, "float32", []),
        (CPU, None, "tensorfloat32", ["products are float32 (asked tensorfloat32: this cpu rounds nothing)"]),
        (CPU, "tensorfloat32", "float32", []),
        (CPU, "highest", "float32", []),
        (CPU, "default", "float32", []),
        (
            GPU,
            None,
            "float32",
            ["products are tensorfloat32 by default (the device's own choice), and this run uses"],
        ),
        (GPU, "default", "float32", ["products are tensorfloat32 by default (jax_default_matmul_precision is 'def"]),
        (GPU, "float32", "float32", []),
        (GPU, None, "tensorfloat32", []),
        (GPU, "high", "tensorfloat32", []),
        (
            GPU,
            "highest",
            "tensorfloat32",
            ["products are float32 by default (jax_default_matmul_precision is 'highest"],
        ),
        (GPU, None, "mixed", []),
        (GPU, "bfloat16", "bfloat16", []),
        (TPU, None, "tensorfloat32", ["products are bfloat16 by default (the device's own choice)"]),
        (("bfloat16", {}), None, "float32", ["products are bfloat16 (asked float32: this cpu rounds in another way)"]),
    ],
)
def test_a_default_other_than_the_tested_precision_is_noted(
    kind: Any, setting: str | None, precision: str, said: list[str], device: Callable[..., None]
) -> None:
    device(*kind)
    with jax.default_matmul_precision(setting):
        found = notes(PRECISIONS[precision])
    assert len(found) == len(said)
    assert all(note.startswith(begun) for note, begun in zip(found, said, strict=True))


def test_the_header_warns_about_the_tested_precisions(pytestconfig: pytest.Config, device: Callable[..., None]) -> None:
    device(*GPU)
    options = pytestconfig.option
    before = options.precision
    try:
        for asked, warned in ((None, ["float32"]), (["mixed"], []), (["tensorfloat32", "float32"], ["float32"])):
            options.precision = asked
            lines = vit_ref.testing.plugin.pytest_report_header(pytestconfig)
            warnings = [line for line in lines if line.startswith("warning")]
            assert [line.split(":")[1] for line in warnings] == [f" {name}" for name in warned]
            assert [line.split(":")[0] for line in lines if line not in warnings] == (asked or ["float32"])
    finally:
        options.precision = before


def test_a_report_notes_the_products_of_the_device(device: Callable[..., None]) -> None:
    device(*CPU)
    found = environment.environment(PRECISIONS["tensorfloat32"])
    report = ported(parity(measured("norm"), measured("logits"), precision="tensorfloat32"), environment=found)
    made = "float32 (asked tensorfloat32: this cpu rounds nothing)"
    assert f"note: products are {made}" in " ".join(summary(report).split())
    assert to_json(report)["environment"]["note"] == f"products are {made}"
    assert to_json(report)["environment"]["products"] == made
    assert f"<dt>products</dt><dd>{made}</dd>" in to_html(report)
    assert to_json(report)["precision"] == "tensorfloat32"
    assert "note" not in environment.environment(PRECISIONS["float32"])
    header, row, _ = table(report.forward).splitlines()
    assert len(header) == len(row) and " tensorfloat32 " in header


@pytest.mark.parametrize("build", [own, lambda: FlaxViTReference(CASE.config, CASE.checkpoint().tensors)])
def test_a_compiled_backward_pass_serves_one_matmul_precision(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU multiplies equally in both, so only the compilations can be counted.
    compiled: list[str] = []

    def counted(work: Callable[[], Any]) -> None:
        compiled.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]

    monkeypatch.setattr(objectives, "beside", counted)
    implementation = build()
    for each in ("float32", "tensorfloat32", "float32"):
        implementation.gradients(CASE.images(), PRECISIONS[each])
    assert compiled == ["float32", "tensorfloat32"]


def test_a_missing_package_is_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = environment.environment()
    assert found["torch"] == "not installed" and found["jax"] == "1.0"
