"""Import of packages that only an extra installs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vit_ref.errors import InputError


def extra(module: str, purpose: str, name: str = "finetune") -> Any:
    """Imports a module that an extra installs.

    Args:
      module: name of the module.
      purpose: what needs the module, for the message.
      name: name of the extra.

    Raises:
      InputError: the module is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name not in (module, package):
            raise
        raise InputError(f"{purpose} needs {package}: pip install 'vit-ref[{name}]'") from None
