"""Fine-tuning: trains a classifier on images, and predicts the classes of others."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
