"""What fine-tuning and benchmarks need beyond the package's own dependencies."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vit_ref.errors import InputError


def extra(module: str, purpose: str, name: str = "finetune") -> Any:
    """A module that an extra installs.

    Args:
      module: its name.
      purpose: what needs it, for the message.
      name: of the extra.

    Raises:
      InputError: it is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name not in (module, package):
            raise
        raise InputError(f"{purpose} needs {package}: pip install 'vit-ref[{name}]'") from None
