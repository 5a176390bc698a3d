"""Verification: references, the oracle, gates and the report, behind `vit-ref verify` and `pytest -m parity`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
