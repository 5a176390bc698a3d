"""Bugs in preprocessing. It comes before the first site, so none of them has a site."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.mutants.injection import Inject, instead
from tests.mutants.mutant import Mutant
from vit_ref import preprocessing

FOLDER = "tests/preprocessing/test_preprocessing.py"


def _default(**wrong: Any) -> Inject:
    return lambda monkeypatch: monkeypatch.setattr(preprocessing, "_VIT", {**preprocessing._VIT, **wrong})


def _applied(change: Any) -> Inject:
    """Calls `change(apply, steps, image)` instead of resizing, rescaling and normalising one image."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        apply = preprocessing._apply
        monkeypatch.setattr(preprocessing, "_apply", lambda steps, image: change(apply, steps, image))

    return inject


def _centre_cropped(apply: Any, steps: Any, image: Image.Image) -> Any:
    side = min(image.size)
    return apply(steps, ImageOps.fit(image, (side, side)))


def _blended(monkeypatch: pytest.MonkeyPatch) -> None:
    upright = preprocessing._upright_rgb

    def blended(image: Image.Image) -> Image.Image:
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return upright(image)

    monkeypatch.setattr(preprocessing, "_upright_rgb", blended)


def _as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    upright = preprocessing._upright_rgb
    monkeypatch.setattr(preprocessing, "_upright_rgb", lambda image: upright(Image.fromarray(np.asarray(image))))


def _bicubic(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = preprocessing.steps
    monkeypatch.setattr(preprocessing, "steps", lambda config: dataclasses.replace(steps(config), resample=3))


MUTANTS = (
    Mutant(
        number=42,
        name="imagenet-mean-and-deviation",
        story="0.485, 0.456, 0.406 for 0.5",
        source="Olive #1781, vit.cpp #18",
        inject=_default(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "without_a_size"),
    ),
    Mutant(
        number=43,
        name="bicubic-images",
        story="images are resized with a filter other than the file's",
        source="HF #37112",
        inject=_bicubic,
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "references_bits and RGB and not jpeg"),
    ),
    Mutant(
        name="divided-by-256",
        story="pixels are divided by 256",
        source="fixed-point code",
        inject=_default(rescale_factor=1 / 256),
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "without_a_size"),
    ),
    Mutant(
        name="rescaled-in-float32",
        story="pixels are multiplied by 1/255 in float32: one unit of rounding",
        source="the fast image processors of transformers",
        inject=lambda monkeypatch: instead(monkeypatch, preprocessing, "np.float64", np.float32),
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "without_a_size"),
    ),
    Mutant(
        name="resized-to-width-by-height",
        story="Pillow's (width, height) for NumPy's (height, width)",
        source="Pillow's size against NumPy's shape",
        inject=lambda monkeypatch: monkeypatch.setattr(
            preprocessing, "_size", lambda name, value, size=preprocessing._size: size(name, value)[::-1]
        ),
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "without_a_size"),
    ),
    Mutant(
        name="centre-cropped",
        story="images are cropped to the middle square, as in torchvision's usual transform",
        source="timm's evaluation transform has crop_pct",
        inject=_applied(_centre_cropped),
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "without_a_size"),
    ),
    Mutant(
        name="exif-ignored",
        story="photographs from a phone lie on their side",
        source="Pillow opens them as stored; ViTImageProcessor too",
        inject=_as_stored,
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "turned_upright and 6-jpg"),
    ),
    Mutant(
        name="alpha-blended",
        story="transparent pixels become white",
        source="viewers do this; Pillow's convert does not",
        inject=_blended,
        killed_by="preprocessing",
        tests=(FOLDER, "-k", "alpha_is_dropped"),
    ),
)
