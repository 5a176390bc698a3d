"""For pytest: the plugin, the parity suite, and checks as test cases in your own suite."""

import lazy_loader

# pytest loads the plugin in every project, and with it this file. So neither may import jax.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
