"""Does every public name exist, and does `import vit_ref` wait for jax only when a name is used?"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ("vit_ref", "vit_ref.verify", "vit_ref.finetune", "vit_ref.testing")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_what_its_module_defines(package: str) -> None:
    if package == "vit_ref.finetune":
        pytest.importorskip("grain", reason="needs what fine-tuning needs: pip install 'vit-ref[finetune]'")
    module = import_module(package)
    assert module.__all__ == sorted(module.__all__) and module.__all__
    for name in module.__all__:
        assert getattr(module, name).__name__.rpartition(".")[2] == name and name in dir(module)
    assert not hasattr(module, "nothing")


def test_importing_the_package_makes_preprocessing_available() -> None:
    program = "import vit_ref; print(vit_ref.preprocessing.preprocess.__name__)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "preprocess\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_does_not_import_jax(package: str) -> None:
    program = f"import sys, {package}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert package in modules
    assert not {"jax", "flax", "numpy", "transformers", "torch"} & set(modules)
