# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune a Vision Transformer
#
# Load a ViT, check that it equals the reference's ViT, give it a new head, fine-tune it, and let it predict. With
# `CHECKPOINT = DATA = None` this runs anywhere in a minute, on generated images. For real data set
# `CHECKPOINT = "google/vit-base-patch16-224"`, `DATA = "ethz/food101"`, `SPLITS = "train[:5000]", "validation[:1000]"`
# and `CLASSES = 5`, or name any directory with one folder of images for each class.
#
# `pip install 'vit-ref[finetune]'`; the second step needs `vit-ref[test]` too, for the reference.

# %%
import importlib.util
import tempfile
from pathlib import Path

import numpy as np

import vit_ref
from vit_ref.finetune import (
    Augmentation,
    Conduct,
    Recipe,
    draw,
    finetune,
    illustrate,
    make_starting_model,
    open_dataset,
    plots,
    predict,
    summarise,
)

CHECKPOINT = None
DATA, SPLITS, CLASSES = None, ("train", "validation"), None
OUT = Path(tempfile.mkdtemp(prefix="finetune-"))

# The tutorial's recipe is `Recipe()`: SGD, 0.001, momentum 0.8, three epochs. A new model learns faster with Adam.
scratch = Recipe(epochs=3, optimizer="adamw", learning_rate=3e-3, grad_clip=1.0, warmup_ratio=0.1)
recipe = scratch if CHECKPOINT is None else Recipe()

# %% [markdown]
# ## Images
#
# Opening a data set reads every image once, so that a broken one is known before training. An augmented image depends
# only on (seed, epoch, index), so any one can be drawn again.

# %%
training = open_dataset(DATA, SPLITS[0], classes=CLASSES)
validation = open_dataset(DATA, SPLITS[1], classes=training.classes)
print(f"{len(training)} + {len(validation)} images of {len(training.classes)} classes: {', '.join(training.classes)}")

model = make_starting_model(CHECKPOINT, training.classes, recipe)
augmented = np.stack([draw(training, model.config, Augmentation(), seed=0, epoch=0, index=i) for i in range(8)])
plots.plot_batches(
    OUT / "before-and-after.png",
    [training[i].image for i in range(8)],
    plots.make_visible(augmented, model.config),
    [training.classes[training[i].label] for i in range(8)],
)

# %% [markdown]
# ## Is the model equal to the reference?
#
# Similar logits are not enough: the check compares every site with a float64 oracle.

# %%
start = OUT / "start"
vit_ref.save_pretrained(model, start)
if importlib.util.find_spec("transformers"):
    report = vit_ref.check_port(None, start, backward=False)
    print("the starting model is right" if report.passed else "the starting model is wrong")

# %% [markdown]
# ## Fine-tune
#
# The head is new and starts as zeros. `resume=True` continues a run that was stopped, to the same bits.

# %%
outcome = finetune(CHECKPOINT, training, validation, OUT / "run", recipe, Conduct(quiet=True))
print(summarise(outcome))
for name, accuracy in zip(validation.classes, outcome.evaluation.per_class, strict=True):
    print(f"  {accuracy:6.1%}  {name}")

# %% [markdown]
# ## Look at the plots
#
# `run/plots` holds schedule, losses, confusion, predictions and attention as PNG files.

# %%
illustrate(outcome, training, validation, recipe)
print(*sorted(path.name for path in (OUT / "run" / "plots").iterdir()))

# %% [markdown]
# ## Predict
#
# The saved model is a Hugging Face directory, which transformers and `vit-ref predict` load.

# %%
best = vit_ref.from_pretrained(outcome.directory)
for i, found in zip((0, 1), predict(best, [validation[0].image, validation[1].image], top=2), strict=True):
    likeliest = ", ".join(f"{name} {probability:.0%}" for name, probability in found)
    print(f"{validation.classes[validation[i].label]}: {likeliest}")
