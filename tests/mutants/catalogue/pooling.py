"""Bugs after the last block: which token, which pooler, which head."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.mutants.injection import Inject, Pass, at, loaded
from tests.mutants.mutant import Mutant, forward
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import list_parameters
from vit_ref.weights import mapping
from vit_ref.weights.layouts import Layout


def _head_reads(pool: Any) -> Inject:
    """Makes the head read `pool(here)` instead of the normalised cls token."""
    return at("logits", lambda value, here: here.model.head(pool(here)))


def _missing_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    port = mapping.port

    def lenient(source: mapping.Tensors, config: ViTConfig, layout: Layout, **options: Any) -> dict:
        shapes = list_parameters(config)
        made_up = {
            rule.source: np.random.default_rng(0)
            .normal(0, 0.02, mapping.compute_source_shape(rule, shapes[rule.destination], config))
            .astype(np.float32)
            for rule in layout.bind(config, prefixed=mapping.is_prefixed(source, layout))
        }
        return port({**made_up, **source}, config, layout, **options)

    monkeypatch.setattr(mapping, "port", lenient)


def _linear_pooler(value: Array, here: Pass) -> Array:
    return here.model.pooler(here["norm"][:, 0])


MUTANTS = (
    Mutant(
        number=28,
        name="mean-pooled",
        story="the head reads the mean of all tokens",
        source="vision_transformer's classifier='gap'",
        inject=_head_reads(lambda here: here["norm"].mean(axis=1)),
        first_site="logits",
        cause="mean of the tokens pooled",
    ),
    Mutant(
        name="norm-after-the-pool",
        story="the mean of the patches' tokens is taken before the norm",
        source="MAE's and BEiT's fc_norm",
        inject=_head_reads(lambda here: here.model.norm(here.stream[:, 1:].mean(axis=1))),
        first_site="logits",
        cause="norm after the mean of the patches",
    ),
    Mutant(
        name="last-token-pooled",
        story="the head reads the last token, as a language model's does",
        source="big_vision and CLIP's text tower",
        inject=_head_reads(lambda here: here["norm"][:, -1]),
        first_site="logits",
        cause="last token pooled",
    ),
    Mutant(
        number=29,
        name="tanh-pooler-dropped",
        story="the pooler's dense layer without its tanh",
        source="PyTorch-Pretrained-ViT #7",
        inject=at("pooler", _linear_pooler),
        tests=forward("pooler"),
        first_site="pooler",
        cause="no activation",
    ),
    Mutant(
        name="tanh-before-the-head",
        story="the classifier has the tanh of pre-logits, which the checkpoint lacks",
        source="PyTorch-Pretrained-ViT #7",
        inject=_head_reads(lambda here: jnp.tanh(here["norm"][:, 0])),
        first_site="logits",
        cause="tanh added",
    ),
    Mutant(
        number=30,
        name="missing-tensors-made-up",
        story="a head or pooler that the checkpoint lacks is initialised at random without a message",
        source="HF #14017, #25377",
        inject=_missing_made_up,
        killed_by="porting",
        # Nothing is computed: the test expects a refusal and gets none.
        tests=("tests/porting/test_rules.py", "-k", "any_one_tensor_dropped and classifier-hf"),
    ),
    Mutant(
        name="left-over-tensors-ignored",
        story="tensors that match no rule are ignored without a message",
        source="strict=False",
        inject=lambda monkeypatch: monkeypatch.setattr(mapping, "port", functools.partial(mapping.port, ignore=["*"])),
        killed_by="porting",
        # Nothing is computed: the test expects a refusal and gets none.
        tests=("tests/porting/test_rules.py", "-k", "beyond_the_configuration and hf5"),
    ),
    Mutant(
        name="head-bias-dropped",
        story="the head is loaded without its bias",
        source="zero-shot heads have none",
        inject=loaded(lambda parameters, config: {"head.bias": np.zeros_like(parameters["head.bias"])}),
        first_site="logits",
        cause="bias left out",
    ),
)
