"""Bugs in the residual stream, forward and backward."""

from __future__ import annotations

import jax

from tests.mutants.injection import at, both
from tests.mutants.mutant import Mutant, backward

MUTANTS = (
    Mutant(
        number=33,
        name="residual-after-the-norm",
        story="the residual is the normalised stream",
        source="post-norm and pre-norm blocks differ in one line",
        inject=both(
            at("block.*.attn.residual", lambda value, here: here["norm1"] + here["attn.out"]),
            at("block.*.mlp.residual", lambda value, here: here["norm2"] + here["mlp.out"]),
        ),
        first_site="block.0.attn.residual",
        cause="residual taken after the norm",
    ),
    Mutant(
        name="no-residual-around-the-mlp",
        story="the MLP's output replaces the stream",
        source="Hugging Face's ViTOutput adds it in another module than the dense layer's own",
        inject=at("block.*.mlp.residual", lambda value, here: here["mlp.out"]),
        first_site="block.0.mlp.residual",
        cause="residual left out",
    ),
    Mutant(
        name="mlp-reads-the-stream",
        story="the second norm is computed, but the MLP gets the norm's input",
        source="x and its normalised self under one name",
        inject=at("block.*.mlp.fc1", lambda value, here: here.block.mlp.fc1(here["attn.residual"])),
        first_site="block.0.mlp.fc1",
        cause="input not normalised",
    ),
    Mutant(
        name="a-layer-left-at-zero",
        story="the last layer of each MLP starts at zero and is never loaded",
        source="zero initialisation of residual branches",
        inject=at("block.*.mlp.out", lambda value, here: 0 * value),
        first_site="block.0.mlp.out",
        cause="all zero",
    ),
    Mutant(
        number=50,
        name="gradient-stopped-at-the-residual",
        story="the stream is detached where attention is added; the forward pass is right",
        source="stop_gradient left over from another objective",
        inject=at("block.*.attn.residual", lambda value, here: jax.lax.stop_gradient(here.stream) + here["attn.out"]),
        tests=backward("rectangular"),
        # The gradients of attention are right in the last block; the gradient that the stream passes to the block
        # before is wrong.
        first_site="block.0.mlp.residual",
    ),
    Mutant(
        name="gradient-doubled-at-the-residual",
        story="a hand-written backward pass adds the stream's gradient twice",
        source="accumulating into a buffer that was not cleared",
        inject=at(
            "block.*.mlp.residual",
            lambda value, here: value + here["attn.residual"] - jax.lax.stop_gradient(here["attn.residual"]),
        ),
        tests=backward("rectangular"),
        first_site="block.1.attn.residual",
    ),
)
