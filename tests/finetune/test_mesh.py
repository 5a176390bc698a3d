"""Does every array lie where it is said to?"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vit_ref.errors import InputError
from vit_ref.finetune.mesh import mesh_for, shardings

pytestmark = pytest.mark.training

EIGHT = AbstractMesh((8,), ("data",))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((384, 1536), PartitionSpec(None, "data")),  # the longest axis
        ((1536, 384), PartitionSpec("data", None)),
        ((1000, 1001), PartitionSpec("data", None)),  # the longest that eight devices divide evenly
        ((14, 14, 3, 384), PartitionSpec(None, None, None, "data")),
        ((997, 1001), PartitionSpec()),  # none
        ((384,), PartitionSpec()),  # too small to be worth gathering
        ((), PartitionSpec()),
    ],
)
def test_large_arrays_are_divided_along_the_longest_axis_that_can_be(
    shape: tuple[int, ...], spec: PartitionSpec
) -> None:
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    assert shardings({"a": leaf}, EIGHT, "fsdp")["a"].spec == spec
    assert shardings({"a": leaf}, EIGHT, "data")["a"].spec == PartitionSpec()


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    with pytest.raises(InputError, match="batch_size is 36: give a multiple of the 8 devices"):
        mesh_for(36)
