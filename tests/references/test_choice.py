"""Does the option `--reference` select the reference that it names, or say why it cannot?"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vit_ref.testing.plugin
from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError, ReferenceUnavailableError, UnsupportedByReferenceError
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.cases import CASES
from vit_ref.verify.gates import error
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.references import choice
from vit_ref.verify.references.choice import REFERENCES, NumpyReference, reference_for, require
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.session import Session


def test_numpy_is_a_forward_reference() -> None:
    case, source = CASES["rectangular"], CASES["rectangular"].checkpoint()
    candidate = OwnCandidate(case.config, source)
    report = Session(case.config, source, case.images(), candidate, reference="numpy", title="chosen").forward()
    assert report.passed and report.reference == "NumPy"
    # NumPy sums in another order than jax.
    assert all(result.gate > 4 * result.reference_error for result in report.results)


@pytest.mark.parametrize(("kind", "unit"), [("float32", 2.0**-24), ("tensorfloat32", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_numpy_rounds_every_product_as_the_device_does(kind: str, unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU uses TF32. With unrounded products the gate would leave a right candidate no room."""
    case, tensors = CASES["rectangular"], CASES["rectangular"].checkpoint().tensors
    reference, pixels, rounded = NumpyReference(case.config, tensors), case.images(), []
    truth = NumpyOracle(case.config, tensors).trace(pixels)
    round_operand = choice._OPERANDS[kind]
    monkeypatch.setattr(choice, "products", lambda: kind)
    monkeypatch.setitem(choice._OPERANDS, kind, lambda x: (rounded.append(x), round_operand(x))[1])
    # The relative error of a product is that of its operands: at most a unit of rounding, and some tenths on average.
    assert (
        0.1 * unit
        < error(reference.trace(pixels, precision_of(np.float32))["patches"], truth["patches"]).rms
        < 2 * unit
    )
    # Products of the patches, of six layers, scores and context in each block, and of the head.
    assert len(rounded) == 2 * (1 + 8 * case.config.num_hidden_layers + 1)
    for site, value in reference.trace(pixels, FLOAT64).items():
        np.testing.assert_array_equal(value, truth[site])


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        (
            "rectangular",
            "numpy",
            "^the NumPy oracle has no gradients: use the reference flax, or torch for whole models$",
        ),
        (
            "rectangular-patch",
            "flax",
            "^FlaxViT needs square patches .*, and the NumPy oracle has no gradients: for .* torch$",
        ),
    ],
)
def test_numpy_has_no_gradients(name: str, reference: str, message: str) -> None:
    case, source = CASES[name], CASES[name].checkpoint()
    try:
        require(reference)
    except ReferenceUnavailableError as error:
        pytest.skip(str(error))
    candidate = OwnCandidate(case.config, source)
    with pytest.raises(UnsupportedByReferenceError, match=message):
        Session(case.config, source, case.images(), candidate, reference=reference, title="chosen").backward()


def test_an_unknown_reference_is_refused() -> None:
    case = CASES["rectangular"]
    with pytest.raises(InputError, match=r"^reference is 'nobody': known are flax, torch, numpy$"):
        reference_for(case.config, case.checkpoint().tensors, "nobody")


def test_a_missing_reference_names_the_package_to_install() -> None:
    missing = {}
    for name in REFERENCES:
        try:
            require(name)
        except ReferenceUnavailableError as error:
            missing[name] = str(error)
    if not missing:
        pytest.skip("all references are installed")
    for name, message in missing.items():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "parity", "--reference", name]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert (ended.returncode, ended.stderr.strip()) == (2, f"Exit: {message}")


@pytest.mark.parametrize(
    ("reference", "installed", "message"),
    [
        (
            "flax",
            {"transformers": "5.1.0"},
            "5.1.0 has no FlaxViT, but 4.x has it: .*'transformers>=4.50,<5'",
        ),
        ("flax", {}, "FlaxViT needs transformers, which is not installed: .*'transformers>=4.50,<5'"),
        ("torch", {}, "needs torch, which is not installed: .*'torch>=2.4'"),
        ("torch", {"torch": "2.13.0+cpu"}, "needs transformers, which is not installed: .*'transformers>=4.57'"),
        ("torch", {"torch": "2.13.0", "transformers": "4.50.3"}, "transformers 4.57 or later, found 4.50.3: .*>=4.57'"),
        ("torch", {"torch": "1.13.1", "transformers": "5.23.0"}, "torch 2.4 or later, found 1.13.1: .*'torch>=2.4'"),
        ("torch", {"torch": "2.13.0+cpu", "transformers": "5.0.0rc1"}, None),
        ("flax", {"transformers": "4.57.6"}, None),
        ("numpy", {}, None),
    ],
)
def test_a_missing_reference_is_one_line_and_exit_code_2(
    reference: str, installed: Mapping[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    given = {"reference": reference, "checkpoint": [], "candidate": []}
    config = SimpleNamespace(
        getoption=lambda name, default: given.get(name, default), addinivalue_line=lambda name, line: None
    )
    if message is None:
        vit_ref.testing.plugin.pytest_configure(config)
        return
    with pytest.raises(pytest.exit.Exception, match=message) as ended:
        vit_ref.testing.plugin.pytest_configure(config)
    assert ended.value.returncode == 2
    assert len(str(ended.value).splitlines()) == 1
