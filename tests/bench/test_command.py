"""Does `vit-ref bench` print, draw and save what it timed?"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from vit_ref.bench import measure, roofline
from vit_ref.bench.compiling import Cost
from vit_ref.bench.contenders import Contender, Entry
from vit_ref.bench.measure import Timing
from vit_ref.bench.report import plot
from vit_ref.bench.workload import Workload
from vit_ref.cli.commands import main
from vit_ref.errors import InputError
from vit_ref.model import config


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Ti a model of two narrow blocks, which compiles in a second, and the products small."""
    monkeypatch.setitem(config._VARIANTS, "Ti", (48, 2, 96, 3))
    monkeypatch.setitem(roofline._SIDES, "cpu", (256,))


def _run(*options: str) -> Result:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # Patches of 112 pixels give five tokens.
        return CliRunner().invoke(main, ["bench", "--size", "Ti/112", "--rounds", "2", *options])


def test_a_run_is_printed_drawn_and_saved(tmp_path: Path) -> None:
    picture, data = tmp_path / "bench.png", tmp_path / "bench.json"
    names = ["--implementation", "vit_ref", "--implementation", "FlaxViT"]
    options = ["--batch", "1", "--batch", "2", "--pass", "forward", *names]
    result = _run(*options, "--plot", str(picture), "--json", str(data))
    assert result.exit_code == 0, result.output
    titles = [line.strip() for line in result.output.splitlines() if "Ti/112" in line]
    assert titles == [f"forward, Ti/112, batch {batch}, float32" for batch in (1, 2)]
    content = json.loads(data.read_text())
    assert content["environment"]["jax"] == jax.__version__
    timings = content["timings"]
    assert [(t["batch"], t["implementation"]) for t in timings] == [
        (batch, name) for batch in (1, 2) for name in ("vit_ref", "FlaxViT")
    ]
    for timing in timings:
        assert len(timing["seconds"]) == 2 and min(timing["seconds"]) > 0
        assert timing["images/s"] == timing["batch"] / timing["median_s"]
        assert timing["MFU"] == timing["FLOPs"] / timing["median_s"] / timing["roofline FLOP/s"]
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(2**20) or ()) > 10


def test_a_train_step_holds_two_moments_of_each_parameter(tmp_path: Path) -> None:
    data = tmp_path / "bench.json"
    one = ["--pass", "forward", "--pass", "train", "--batch", "1", "--implementation", "vit_ref", "--json", str(data)]
    assert _run(*one).exit_code == 0
    forward, step = json.loads(data.read_text())["timings"]
    assert (forward["what"], step["what"]) == ("forward", "train")
    # 1.9 M parameters of four bytes, most of them in the patches' kernel.
    assert step["peak bytes"] - forward["peak bytes"] > 2 * 1.9e6 * 4


def test_a_batch_that_does_not_fit_is_halved_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(workload: Workload) -> Contender:
        if workload.batch > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Contender("vit_ref", lambda times=1: None, Cost(1.0))

    monkeypatch.setitem(measure.CONTENDERS, "vit_ref", Entry(build))
    result = _run("--batch", "4", "--pass", "forward", "--implementation", "vit_ref")
    assert result.exit_code == 0
    said = "vit-ref: forward, Ti/112, batch 4, float32: out of memory: trying batch 2"
    assert said in result.stderr and "forward, Ti/112, batch 2, float32" in result.stdout


@pytest.mark.torch
@pytest.mark.parametrize("when", ["asked to", "called"])
def test_torch_compile_is_left_out_without_a_compiler(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'vit-ref[torch]'")

    def fail(*_: object) -> None:
        # torch raises a class derived from this one. To import torch's compiler takes long.
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", fail if when == "asked to" else lambda model: fail)
    built = Entry(lambda workload: Contender("vit_ref", lambda times=1: None, Cost(1.0)))
    monkeypatch.setitem(measure.CONTENDERS, "vit_ref", built)
    one = ["--batch", "1", "--pass", "forward", "--implementation", "torch.compile"]
    result = _run(*one, "--implementation", "vit_ref")
    said = (
        "torch.compile failed (InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx): install what it"
        " needs, usually a C++ compiler, or choose others with --implementation\n"
    )
    assert (result.exit_code, result.exception) == (0, None)
    assert result.stderr == f"vit-ref: forward, Ti/112, batch 1, float32: torch.compile is left out: {said}"
    assert "vit_ref" in result.stdout and "torch.compile" not in result.stdout
    alone = _run(*one)
    assert (alone.exit_code, alone.stderr) == (2, f"vit-ref: {said}")


def test_what_was_timed_is_saved_though_the_next_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(workload: Workload) -> Contender:
        if workload.what != "forward":
            raise MemoryError
        return Contender("vit_ref", lambda times=1: None, Cost(1.0))

    monkeypatch.setitem(measure.CONTENDERS, "vit_ref", Entry(build))
    data = tmp_path / "bench.json"
    result = _run("--batch", "1", "--implementation", "vit_ref", "--json", str(data))
    assert result.exit_code == 2
    assert "vit-ref: train, Ti/112, batch 1, float32: one image does not fit" in result.stderr
    assert [timing["what"] for timing in json.loads(data.read_text())["timings"]] == ["forward"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--json", "none/a.json"), "none/a.json: its directory does not exist: make it first"),
        (("--plot", "."), ".: it is a directory: give the name of a file"),
        (("--plot", "a", "--json", "./a"), "a: --plot and --json name the same file: give two different files"),
    ],
)
def test_places_that_cannot_be_are_said_before_anything_is_timed(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(measure.CONTENDERS, "vit_ref", Entry(lambda workload: pytest.fail("it was timed")))
    result = _run("--implementation", "vit_ref", *options)
    assert (result.exit_code, result.stderr) == (2, f"vit-ref: {said}\n")


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "bench.png"
    work = Workload("Ti/112", 1, "float32", "forward")
    with pytest.raises(InputError) as caught:
        plot(missing, [Timing("vit_ref", work, (1.0, 1.0), 1, 1e12, Cost(1.0))])
    assert str(caught.value) == f"{missing}: it cannot be written (No such file or directory): give another place"
