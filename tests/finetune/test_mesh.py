"""Does every array have the sharding that the rules say?"""

from __future__ import annotations

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from vit_ref.errors import InputError
from vit_ref.finetune.mesh import choose_shardings, make_mesh
from vit_ref.finetune.optimizer import make_transformation, select_trained
from vit_ref.finetune.recipe import Recipe
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer

CONFIG = ViTConfig(
    hidden_size=96,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=104,
    image_size=15,
    patch_size=5,
    num_labels=7,
)
# All that a recipe can need of an optimizer: moments, sums of gradients, and a lowest block with neither.
RECIPE = Recipe(optimizer="adamw", grad_accum_steps=2, layer_decay=0.9, freeze_blocks=1)


def placed(kind: str, devices: int) -> dict[str, PartitionSpec]:
    def training() -> tuple[VisionTransformer, nnx.Optimizer]:
        model = VisionTransformer(CONFIG, rngs=nnx.Rngs(0))
        blocks = CONFIG.num_hidden_layers
        return model, nnx.Optimizer(model, make_transformation(RECIPE, 8, blocks), wrt=select_trained(RECIPE, blocks))

    state = nnx.state(nnx.eval_shape(training))
    found = choose_shardings(state, CONFIG, AbstractMesh((devices,), ("data",)), kind)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    return {".".join(map(str, path)): variable.get_value().spec for path, variable in nnx.to_flat_state(found)}


def divided(specs: dict[str, PartitionSpec]) -> dict[str, PartitionSpec]:
    return {path: spec for path, spec in specs.items() if any(spec)}


KERNELS = {
    "attn.query.kernel": PartitionSpec("data", None),
    "attn.key.kernel": PartitionSpec("data", None),
    "attn.value.kernel": PartitionSpec("data", None),
    "attn.out.kernel": PartitionSpec(None, "data"),
    "mlp.fc1.kernel": PartitionSpec("data", None),
    "mlp.fc2.kernel": PartitionSpec(None, "data"),
}


def test_large_parameters_and_their_moments_are_divided() -> None:
    specs = placed("fsdp", 8)
    lies = divided(specs)
    model = {f"0.blocks.{i}.{path}": spec for i in (0, 1) for path, spec in KERNELS.items()}
    patch = PartitionSpec(None, None, None, "data")
    assert {path: spec for path, spec in lies.items() if path.startswith("0.")} == {**model, "0.patch.kernel": patch}
    moments = [path for path in lies if path.startswith("1.")]
    # The first block and the patches are frozen. One block's arrays remain, in two moments and the sum.
    assert len(moments) == 3 * len(KERNELS)
    assert all(lies[path] == KERNELS[path.partition(".blocks.1.")[2]] for path in moments)
    assert len(lies) < len(specs)


# 96 is no multiple of 5 or 7, so runs on that many devices keep whole parameters.
@pytest.mark.parametrize(("kind", "devices"), [("data", 8), ("fsdp", 5), ("fsdp", 7)])
def test_else_everything_is_on_every_device(kind: str, devices: int) -> None:
    assert divided(placed(kind, devices)) == {}


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    with pytest.raises(InputError, match="batch_size is 36: give a multiple of 8, the number of devices"):
        make_mesh(36)
