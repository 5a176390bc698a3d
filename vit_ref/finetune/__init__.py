"""Fine-tuning: a classifier from images, and what it says of others."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
