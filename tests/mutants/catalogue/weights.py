"""Bugs in the weight map and in loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.mutants.injection import Inject, instead, loaded
from tests.mutants.mutant import Mutant, backward, forward
from vit_ref.model.config import ViTConfig
from vit_ref.verify.candidates import own
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.weights import pretrained
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.layouts import HF, SAME, Layout


def _layout(layout: Layout) -> Inject:
    """Makes only the candidate read checkpoints with this weight map."""
    return lambda monkeypatch: monkeypatch.setattr(own, "detect", lambda names: layout)


def _untransposed(destination: str) -> Layout:
    rules = (rule._replace(transform=SAME) if rule.destination == destination else rule for rule in HF.rules)
    return dataclasses.replace(HF, rules=tuple(rules))


class _FirstTwice(Layout):
    """Fills block 1 with block 0's tensors."""

    def bind(self, config: ViTConfig, prefixed: bool) -> tuple:
        return tuple(
            rule._replace(source=rule.source.replace(".layer.1.", ".layer.0."))
            for rule in super().bind(config, prefixed)
        )


def _duplicated(monkeypatch: pytest.MonkeyPatch) -> None:
    port = own.port
    _layout(_FirstTwice(**{field.name: getattr(HF, field.name) for field in dataclasses.fields(HF)}))(monkeypatch)
    # A candidate that does not check for unused tensors.
    monkeypatch.setattr(own, "port", lambda *arguments: port(*arguments, ignore=["vit.encoder.layer.1.*"]))


def _blocks(order: Callable[[int], Sequence[int]]) -> Inject:
    """Fills block i with block order(depth)[i]."""

    def change(parameters: dict, config: ViTConfig) -> dict:
        source = order(config.num_hidden_layers)
        return {
            path: parameters[f"blocks.{source[int(path.split('.')[1])]}." + path.split(".", 2)[2]]
            for path in parameters
            if path.startswith("blocks.")
        }

    return loaded(change)


def _exchanged(one: str, other: str) -> Inject:
    """Gives two layers each other's parameters."""
    return loaded(
        lambda parameters, config: {
            path: parameters[path.replace(mine, theirs)]
            for path in parameters
            for mine, theirs in ((one, other), (other, one))
            if mine in path
        }
    )


def _in_the_memory_of_its_transpose(parameters: dict, config: ViTConfig) -> dict:
    """Reads kernels that were saved under (out, in) with the memory of (in, out)."""
    return {
        path: value.reshape(value.shape[::-1]).T
        for path, value in parameters.items()
        if ".mlp." in path and path.endswith("kernel")
    }


def _one_element(monkeypatch: pytest.MonkeyPatch, dose: float) -> None:
    def change(parameters: dict, config: ViTConfig) -> dict:
        kernel = parameters["blocks.1.mlp.fc2.kernel"].astype(np.float64)
        kernel[3, 5] *= 1 + dose
        return {"blocks.1.mlp.fc2.kernel": kernel}

    loaded(change)(monkeypatch)


def _all_rounded(dtype: Any) -> Inject:
    """Rounds all parameters to `dtype` and back."""
    return loaded(
        lambda parameters, config: {path: value.astype(dtype).astype(value.dtype) for path, value in parameters.items()}
    )


def _shorter_config(monkeypatch: pytest.MonkeyPatch) -> None:
    to_hf = ViTConfig.to_hf

    def wrong(self: ViTConfig) -> dict[str, Any]:
        return {name: value for name, value in to_hf(self).items() if name != "qkv_bias"}

    monkeypatch.setattr(ViTConfig, "to_hf", wrong)


def _rounding_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    init = OwnCandidate.__init__

    def wrong(self: OwnCandidate, config: ViTConfig, source: Checkpoint) -> None:
        for tensor in source.tensors.values():
            tensor[...] = tensor.astype(ml_dtypes.bfloat16)
        init(self, config, source)

    monkeypatch.setattr(OwnCandidate, "__init__", wrong)


def _normalising_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = OwnCandidate.trace

    def wrong(self: OwnCandidate, pixels: NDArray, *arguments: Any, **options: Any) -> dict:
        found = trace(self, pixels, *arguments, **options)
        pixels *= 1 + 1e-7
        return found

    monkeypatch.setattr(OwnCandidate, "trace", wrong)


MUTANTS = (
    Mutant(
        number=11,
        name="square-kernel-not-transposed",
        story="PyTorch's (out, in) is loaded as (in, out): the shape and mean of a square kernel agree",
        source="jax-ai-stack's check compares means",
        inject=_layout(_untransposed("blocks.{i}.attn.out.kernel")),
        first_site="block.0.attn.out",
        cause="kernel not transposed",
    ),
    Mutant(
        name="saved-with-the-memory-of-its-transpose",
        story="a transposed kernel is saved with its new shape and its old memory; if not square, every value moves",
        source="safetensors.numpy.save_file of a transposed NumPy array (0.8.0)",
        inject=loaded(_in_the_memory_of_its_transpose),
        first_site="block.0.mlp.fc1",
        cause="kernel saved with the memory of its transpose",
    ),
    Mutant(
        number=36,
        name="layers-in-lexicographic-order",
        story="names are sorted as text: block 10 comes before block 2",
        source="nnli #1; Orbax gives a tree's integer keys back as text",
        inject=_blocks(lambda depth: sorted(range(depth), key=str)),
        tests=forward("deep"),
        first_site="block.2.norm1",
        cause="parameters of block.10.norm1",
    ),
    Mutant(
        number=41,
        name="checkpoint-changed-in-place",
        story="the candidate rounds the checkpoint's own arrays, which the reference reads, too",
        source="jax #37830: NumPy's memory is shared, not copied",
        inject=_rounding_in_place,
        first_site="vit.encoder.layer.0.attention.attention.key.bias",
        says="the candidate changed {site} in place",
    ),
    Mutant(
        name="memory-shared-with-the-checkpoint",
        story="jax.device_put shares aligned arrays: writing to them changes the model",
        source="jax #37830",
        inject=lambda monkeypatch: instead(monkeypatch, pretrained, "jnp.array", lambda x, copy: jax.device_put(x)),
        killed_by="porting",
        # The message shows the changed parameters in no fixed order.
        tests=("tests/porting/test_checkpoint.py", "-k", "does_not_share_memory"),
    ),
    Mutant(
        name="images-changed-in-place",
        story="the candidate normalises its images in place, which the reference reads, too",
        source="x *= on an argument",
        inject=_normalising_in_place,
        first_site="the images",
        says="the candidate changed {site} in place",
    ),
    Mutant(
        number=48,
        name="one-layer-loaded-twice",
        story="block 1 gets block 0's weights, and its own are never read",
        source="an index that is not advanced; only a check of completeness in both directions finds it",
        inject=_duplicated,
        tests=forward("rectangular"),
        first_site="block.1.norm1",
        cause="parameters of block.0.norm1",
    ),
    Mutant(
        name="layers-exchanged",
        story="value and output of attention are exchanged in the weight map",
        source="two tensors of one shape",
        inject=_exchanged("attn.value", "attn.out"),
        first_site="block.0.attn.value",
        cause="parameters of block.0.attn.out",
    ),
    Mutant(
        name="blocks-in-reverse",
        story="the last block's weights go into the first",
        source="recursion that builds blocks from the end",
        inject=_blocks(lambda depth: range(depth)[::-1]),
        tests=forward("rectangular"),
        first_site="block.0.norm1",
        cause="parameters of block.1.norm1",
    ),
    Mutant(
        name="one-element-off",
        story="one of 1551 elements of one kernel is wrong",
        source="a flipped bit, a hand-made patch",
        inject=_one_element,
        doses=(1e-2, 1e-4, 1e-9),
        tests=forward("rectangular"),
        first_site="block.1.mlp.out",
    ),
    Mutant(
        name="one-element-off-seen-backward",
        story="the same, but only gradients are compared",
        source="a flipped bit, a hand-made patch",
        inject=lambda monkeypatch: _one_element(monkeypatch, 1e-4),
        tests=backward("rectangular"),
        # The output's own gradient is that of the loss, which depends on the logits.
        first_site="logits",
    ),
    Mutant(
        name="config-forgets-qkv-bias",
        story="a saved config.json does not say that there are no biases",
        source="fields with default values are left out",
        inject=_shorter_config,
        killed_by="properties",
        # Configurations are compared, and nothing is computed.
        tests=("tests/properties/test_configurations.py", "-k", "survives_its_config_json"),
    ),
    Mutant(
        name="weights-through-float16",
        story="the checkpoint was converted through half precision",
        source="download sizes; errors of 1e-4 pass as noise",
        inject=_all_rounded(np.float16),
        first_site="patches",
        cause="parameters rounded to float16",
    ),
    Mutant(
        name="float64-weights-through-float32",
        story="a float64 checkpoint loses its lower half",
        source="jax without x64 does this with a warning, torch.load().float() without one",
        inject=_all_rounded(np.float32),
        tests=forward("stored-float64"),
        first_site="patches",
        cause="parameters rounded to float32",
    ),
)
