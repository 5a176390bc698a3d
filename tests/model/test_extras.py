"""Is a missing extra reported in one line?"""

from __future__ import annotations

import sys

import pytest

from vit_ref.errors import InputError
from vit_ref.extras import extra


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match=r"^loading needs grain: pip install 'vit-ref\[finetune\]'$"):
        extra("grain", "loading")


def test_of_a_missing_packages_module_the_package_is_named() -> None:
    with pytest.raises(InputError, match=r"^a plot needs no_such_package: pip install 'vit-ref\[finetune\]'$"):
        extra("no_such_package.figure", "a plot")


def test_what_a_package_itself_lacks_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json.decoder", None)
    monkeypatch.delitem(sys.modules, "json")
    with pytest.raises(ModuleNotFoundError, match=r"json\.decoder"):
        extra("json", "reading")
