"""Fine-tuning: trains a classifier on images, and predicts the classes of others."""

from typing import TYPE_CHECKING

from vit_ref.lazy import import_on_use

if TYPE_CHECKING:
    from vit_ref.finetune.augmentation import Augmentation
    from vit_ref.finetune.data import ImageDataset, open_dataset
    from vit_ref.finetune.illustration import illustrate
    from vit_ref.finetune.loading import draw
    from vit_ref.finetune.prediction import predict
    from vit_ref.finetune.recipe import Recipe
    from vit_ref.finetune.run import Conduct, Outcome, finetune, summarise
    from vit_ref.finetune.start import make_starting_model

_HOME = {
    "Augmentation": "vit_ref.finetune.augmentation",
    "Conduct": "vit_ref.finetune.run",
    "ImageDataset": "vit_ref.finetune.data",
    "Outcome": "vit_ref.finetune.run",
    "Recipe": "vit_ref.finetune.recipe",
    "draw": "vit_ref.finetune.loading",
    "finetune": "vit_ref.finetune.run",
    "illustrate": "vit_ref.finetune.illustration",
    "open_dataset": "vit_ref.finetune.data",
    "predict": "vit_ref.finetune.prediction",
    "make_starting_model": "vit_ref.finetune.start",
    "summarise": "vit_ref.finetune.run",
}

__all__ = [
    "Augmentation",
    "Conduct",
    "ImageDataset",
    "Outcome",
    "Recipe",
    "draw",
    "finetune",
    "illustrate",
    "make_starting_model",
    "open_dataset",
    "predict",
    "summarise",
]

__getattr__, __dir__ = import_on_use(__name__, _HOME)
