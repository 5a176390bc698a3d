"""Do many devices compute what one computes, at every site and for every gradient?

The gates are those of a candidate: in float64 against one device, and in float32 against one device's own error.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.ways import CASE, JUDGED, WAYS
from vit_ref.model.sites import sites
from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS
from vit_ref.verify.vit import gradient_names

pytestmark = pytest.mark.xdist_group("devices")

SITES = [site.name for site in sites(CASE.config, CASE.batch)]
OBSERVED = {"forward": SITES, "backward": gradient_names(CASE.config)}


@pytest.mark.parametrize("direction", OBSERVED)
def test_float64_is_the_same_formula(direction: str, measured: dict[str, Any]) -> None:
    found = measured[JUDGED][direction]["sites"]
    assert list(found) == OBSERVED[direction]
    wrong = {name: rms for name, (rms, largest, *_) in found.items() if rms > SEMANTIC_RMS or largest > SEMANTIC_MAX}
    assert not wrong


@pytest.mark.parametrize("direction", OBSERVED)
def test_float32_errs_no_more_than_one_device(direction: str, measured: dict[str, Any]) -> None:
    found = measured[JUDGED][direction]["sites"]
    assert list(found) == OBSERVED[direction]
    wrong = {name: (rounding, gate) for name, (*_, rounding, gate) in found.items() if not rounding <= gate}
    assert not wrong


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_the_path_without_a_tap_err_no_more(way: str, measured: dict[str, Any]) -> None:
    rounding, gate = measured[way]["logits"]
    assert rounding <= gate


# A block sums twice over the devices of "model", after attention's out and after fc2 (Megatron-LM, section 3). FSDP
# gathers once what it divides: the patches' kernel and six kernels of the block. A divided batch alone needs nothing.
@pytest.mark.parametrize(
    ("way", "gathers", "sums"),
    [
        ("data-8x1", 0, 0),
        ("fsdp-8x1", 7, 0),
        ("tensor-1x8", 0, 2),
        ("fsdp+tensor-4x2", 7, 2),
        ("fsdp+tensor-2x4", 7, 2),
    ],
)
def test_devices_communicate_as_published(way: str, gathers: int, sums: int, measured: dict[str, Any]) -> None:
    found = measured[way]["communication"]
    # Devices may also exchange parts, once, if the mesh has another order than the gather.
    assert (found.get("all-gather", 0), found.get("all-reduce", 0)) == (gathers, sums)
    assert found.keys() <= {"all-gather", "all-reduce"} | ({"collective-permute"} if gathers and sums else set())
