"""Does `vit-ref bench` print, draw and save what it timed?"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner
from PIL import Image

from vit_ref import config
from vit_ref.bench import roofline
from vit_ref.cli import main

pytestmark = pytest.mark.benchmarks


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ti of two narrow blocks, which compiles in a second, and small products."""
    monkeypatch.setitem(config._VARIANTS, "Ti", (48, 2, 96, 3))
    monkeypatch.setitem(roofline._SIDES, "cpu", (256,))


def test_a_run_is_printed_drawn_and_saved(tmp_path: Path) -> None:
    picture, data = tmp_path / "bench.png", tmp_path / "bench.json"
    # Patches of 112 pixels: five tokens.
    options = ["--size", "Ti/112", "--batch", "1", "--batch", "2", "--precision", "float32", "--rounds", "2"]
    names = ["--implementation", "vit_ref", "--implementation", "FlaxViT"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = CliRunner().invoke(
            main, ["bench", *options, *names, "--plot", str(picture), "--json", str(data)], catch_exceptions=False
        )
    assert result.exit_code == 0, result.output
    titles = [line.strip() for line in result.output.splitlines() if "Ti/112" in line]
    assert titles == [
        f"{what}, Ti/112, batch {batch}, float32" for batch in (1, 2) for what in ("forward", "train step")
    ]
    content = json.loads(data.read_text())
    assert content["environment"]["jax"] == jax.__version__
    timings = content["timings"]
    assert [(t["what"], t["batch"], t["implementation"]) for t in timings] == [
        (what, batch, name) for batch in (1, 2) for what in ("forward", "train step") for name in ("vit_ref", "FlaxViT")
    ]
    for timing in timings:
        assert len(timing["seconds"]) == 2 and min(timing["seconds"]) > 0
        assert timing["images/s"] == timing["batch"] / timing["median_s"]
        assert timing["MFU"] == timing["FLOPs"] / timing["median_s"] / timing["roofline FLOP/s"]
        # 1.9 M parameters of four bytes, most of them the patches'; a train step holds two moments of each, too.
        least = 1 if timing["what"] == "forward" else 3
        assert timing["peak bytes"] > least * 1.9e6 * 4
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(2**20) or ()) > 10


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "bench.png"
    options = ["--size", "Ti/224", "--batch", "1", "--pass", "forward", "--rounds", "2", "--implementation", "vit_ref"]
    result = CliRunner().invoke(main, ["bench", *options, "--plot", str(missing)])
    assert result.exit_code == 2
    assert f"{missing}: cannot be written (No such file or directory)" in result.output.replace("\n", "")
