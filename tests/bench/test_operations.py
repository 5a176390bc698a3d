"""Do the closed form of the operations and XLA's count agree?"""

from __future__ import annotations

from typing import Any

import jax
import pytest

from vit_ref.bench import contenders
from vit_ref.bench.compiling import Cost
from vit_ref.bench.workload import PASSES, Pass, Workload, count_operations
from vit_ref.model import config
from vit_ref.model.config import ViTConfig


@pytest.mark.parametrize("build", [contenders.vit_ref, contenders.flaxvit], ids=lambda build: build.__name__)
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("size", ["Ti/32", "S/16"])
def test_xla_counts_the_products_and_few_operations_besides(
    size: str, what: Pass, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def lowered_only(function: Any, *arguments: Any, **options: Any) -> tuple[Any, Cost]:
        counted.append(jax.jit(function).lower(*arguments).cost_analysis()["flops"])
        return (lambda *given: given[:2]), Cost(0.0)

    monkeypatch.setattr(contenders, "compile_twice", lowered_only)
    # Of each size four blocks: twelve take three times as long to lower.
    for name, (width, _, *rest) in {name: config._VARIANTS[name] for name in ("Ti", "S")}.items():
        monkeypatch.setitem(config._VARIANTS, name, (width, 4, *rest))
    workload = Workload(size, 2, "float32", what)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        build(workload)
    # Norms, softmax, activation and residuals come on top of products of 2 * width operations an element. Times the
    # width: 10.7 (Ti/16) to 12.2 (B/16) forward. In a step, which computes GELU twice, 7.4 to 13.1; most for Ti/32,
    # where
    # AdamW, whose cost does not depend on the images, is large beside few tokens.
    most = 14 if build is contenders.vit_ref and what == "train" else 13
    besides = counted[0] / workload.flops() - 1
    assert 0 < besides < most / workload.config.hidden_size


def test_the_closed_form_is_that_of_the_papers() -> None:
    # He et al. 2022 (https://arxiv.org/abs/2111.06377) and others count multiply-adds: 17.6 G for ViT-B/16, 61.6 G for
    # L/16, 4.6 G for S/16 and 1.26 G for Ti/16 at 224 pixels (timm's tables).
    for size, multiply_adds in (("Ti/16", 1.26e9), ("S/16", 4.6e9), ("B/16", 17.6e9), ("L/16", 61.6e9)):
        found = sum(count_operations(ViTConfig.variant(size, num_labels=1000)).values()) / 2
        assert found == pytest.approx(multiply_adds, rel=0.01)  # they are given to three digits


def test_the_patches_have_one_backward_product_and_all_else_two() -> None:
    forward, step = (Workload("B/16", 3, "float32", what).flops() for what in PASSES)
    assert 3 * forward - step == 3 * 2 * 196 * 16 * 16 * 3 * 768
