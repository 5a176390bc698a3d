"""For pytest: the plugin, the parity suite, and checks as test cases of your own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_ref.testing.parametrize import parametrize_with_checks

__all__ = ["parametrize_with_checks"]


# pytest loads the plugin in every project, and with it this file: neither may wait for jax.
def __getattr__(name: str) -> Any:
    if name in __all__:
        from vit_ref.testing import parametrize

        return getattr(parametrize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
