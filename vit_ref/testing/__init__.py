"""For pytest: the plugin, the parity suite, and checks as test cases in your own suite."""

from typing import TYPE_CHECKING

from vit_ref.lazy import import_on_use

if TYPE_CHECKING:
    from vit_ref.testing.parametrize import parametrize_with_checks

__all__ = ["parametrize_with_checks"]

# pytest loads the plugin in every project, and with it this file. So neither may import jax.
__getattr__, __dir__ = import_on_use(__name__, {"parametrize_with_checks": "vit_ref.testing.parametrize"})
