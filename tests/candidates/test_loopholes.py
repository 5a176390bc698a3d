"""Wrong candidates that once passed, and right ones that were once refused."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from PIL import Image

import vit_ref
from tests.helpers.inner_pytest import run_inside
from vit_ref.errors import InputError
from vit_ref.model import vit as model_of_ours
from vit_ref.model.skeleton import list_parameters, skeleton
from vit_ref.verify.candidates.loading import beside_it, find, load, recognised
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.cases import CASES
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.results import Check
from vit_ref.verify.session import check_port
from vit_ref.weights import layouts, mapping, pretrained

ROOT = Path(__file__).parents[2]
SUITE = Path("vit_ref/testing/suite")
Saved = Callable[[str], Path]
Load = Callable[..., Any]


def functional(around: Callable[[Callable, dict[str, Any], Any], Any], **others: Any) -> Load:
    """Returns a loader of a function and its parameters: `around(model, parameters, images)`.

    `others` are among the parameters.
    """

    def load(path: Path, dtype: Any) -> tuple[Callable, dict[str, Any]]:
        model = vit_ref.from_pretrained(path, dtype=dtype)
        graph, shapes = skeleton(model.config, dtype)
        parameters = {name: jnp.asarray(value, dtype) for name, value in pretrained.get_parameters(model).items()}

        def forward(parameters: dict[str, Any], images: Any, **options: Any) -> Any:
            known = {name: value for name, value in parameters.items() if name not in others}
            return nnx.merge(graph, pretrained.replace_arrays(shapes, known))(images, **options)

        return (lambda parameters, images: around(forward, parameters, images)), {**parameters, **others}

    return load


def plain(forward: Callable, parameters: dict[str, Any], images: Any) -> Any:
    return forward(parameters, images)


def checks(load: Load, saved: Saved, name: str = "one-block", *, backward: bool = True, **how: Any) -> list[Check]:
    candidate = vit_ref.Candidate(load=load, name="mine", **how)
    return list(check_port(candidate, saved(name), backward=backward).checks)


def failures(*arguments: Any, **options: Any) -> list[str]:
    return [check.name for check in checks(*arguments, **options) if check.status == "failed"]


@pytest.mark.parametrize("layout", [layouts.HF, layouts.FLAX, layouts.TIMM], ids=lambda layout: layout.name)
def test_one_infinite_gradient_does_not_hide_the_others(layout: layouts.Layout, saved: Saved) -> None:
    model = vit_ref.from_pretrained(saved("one-block"))
    named = mapping.export(pretrained.get_parameters(model), model.config, layout)
    name = next(name for name in named if named[name].ndim == 1)
    named[name] = np.full_like(named[name], np.inf)
    found = recognised(vit_ref.Candidate(load=print, name="mine"), ViTOutline(model.config), named)
    assert found.keys() == list_parameters(model.config).keys()
    assert sum(not np.isfinite(value).all() for value in found.values()) >= 1


@pytest.mark.parametrize("name", ["softmax", "shown before", "in the table"])
def test_the_returned_output_counts_and_not_a_shown_one(name: str, saved: Saved) -> None:
    class Port(nnx.Module):
        def __init__(self, path: Path, dtype: Any):
            self.model = vit_ref.from_pretrained(path, dtype=dtype)

        def __call__(self, images: Any) -> Any:
            return self.model(images)[:, ::-1]

    class Tapped(Port):
        def __call__(self, images: Any, tap: Any = model_of_ours.identity) -> Any:
            return jax.nn.softmax(self.model(images, tap=tap))

    def returning(model: Any, images: Any) -> Any:
        logits = model.model(images)
        return jax.nn.softmax(logits), {"logits": logits}

    how: dict[str, Any] = {
        "softmax": {"load": lambda path, dtype: Tapped(path, dtype)},
        "shown before": {"load": lambda path, dtype: Port(path, dtype), "call": returning},
        "in the table": {"load": lambda path, dtype: Port(path, dtype), "sites": {"model.head": "logits"}},
    }[name]
    assert failures(how.pop("load"), saved, backward=False, **how) == ["forward/logits"]


@jax.custom_vjp
def averaged(x: Any) -> Any:
    """Returns x itself, but its gradient is the mean over the images."""
    return x


averaged.defvjp(lambda x: (x, None), lambda _, ct: (jnp.broadcast_to(ct.mean(0, keepdims=True), ct.shape),))


def test_a_candidate_that_mixes_images_backward_fails(saved: Saved) -> None:
    mixing = functional(lambda forward, parameters, images: forward(parameters, averaged(images)))
    assert failures(mixing, saved) == ["backward/pixels"]


def test_a_function_is_run_through_the_declared_call(saved: Saved) -> None:
    double = failures(
        functional(plain), saved, backward=False, call=lambda model, images: 2 * model[0](model[1], images)
    )
    assert double == ["forward/logits"]
    assert not failures(functional(plain), saved, backward=False, call=lambda model, images: model[0](model[1], images))


def test_leaves_that_are_not_floats_stay_as_they_are(saved: Saved) -> None:
    def around(forward: Callable, parameters: dict[str, Any], images: Any) -> Any:
        assert parameters["heads"] == 4 and parameters["eps"] == 1e-12 and parameters["act"] == "gelu"
        jax.random.uniform(parameters["key"])
        return forward(parameters, images)

    others = {"heads": 4, "eps": 1e-12, "act": "gelu", "key": jax.random.key(0)}
    found = checks(functional(around, **others), saved)
    assert {check.status for check in found if check.name == "backward/head.kernel"} == {"passed"}
    assert not [check for check in found if check.status == "failed"]


def test_an_nnx_state_as_parameters_has_the_names_of_nnx(saved: Saved) -> None:
    def load(path: Path, dtype: Any) -> tuple[Callable, nnx.State]:
        graph, parameters, rest = nnx.split(vit_ref.from_pretrained(path, dtype=dtype), nnx.Param, ...)
        return (lambda parameters, images: nnx.merge(graph, parameters, rest)(images)), parameters

    found = {check.name: check.status for check in checks(load, saved)}
    assert found["backward/head.kernel"] == found["backward/blocks.0.norm1.scale"] == "passed"


def test_one_photograph_is_joined_by_its_mirror_image(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    config = dataclasses.replace(CASES["rectangular"].config, num_channels=3)
    pixels = pixels_for(config, tmp_path, 4)
    assert len(pixels) == 2
    np.testing.assert_array_equal(pixels[1], pixels[0, :, ::-1])
    assert np.abs(pixels[0] - pixels[1]).max() > 0
    assert len(pixels_for(config, tmp_path, 1)) == 1


def test_a_candidate_at_a_checkouts_root_keeps_its_package() -> None:
    with beside_it(str(ROOT)):
        sys.modules.pop("vit_ref.bench.roofline", None)
        importlib.import_module("vit_ref.bench.roofline")
    assert "vit_ref.bench.roofline" in sys.modules


def test_an_earlier_package_keeps_modules_a_candidate_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next import of the package would make other classes of the same names."""
    (tmp_path / "vit_ref_their_package").mkdir()
    for name in ("__init__", "late"):
        (tmp_path / "vit_ref_their_package" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("vit_ref_their_package")
    with beside_it(str(tmp_path)):
        late = importlib.import_module("vit_ref_their_package.late")
    assert importlib.import_module("vit_ref_their_package.late") is late


def test_each_candidate_file_imports_its_own_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates have a module and a package each, which they import when they are loaded and when they run."""
    for name in ("a", "b"):
        (tmp_path / name / "parts").mkdir(parents=True)
        (tmp_path / name / "vit_ref_their_model.py").write_text(f"import json\nmade = lambda x: {name!r}\n")
        (tmp_path / name / "parts" / "__init__.py").write_text("from parts.inner import which\n")
        (tmp_path / name / "parts" / "inner.py").write_text(f"which = {name!r}\n")
        (tmp_path / name / "late.py").write_text(f"which = {name!r}\n")
        (tmp_path / name / "later.py").write_text(f"which = {name!r}\n")
        (tmp_path / name / "port.py").write_text(
            "import vit_ref, vit_ref_their_model, parts\n"
            "def load(checkpoint):\n"
            "    import late\n"
            "    def run(images):\n"
            "        import later, parts.inner\n"
            "        return images, late.which, later.which, parts.inner.which, vit_ref_their_model.made(0)\n"
            "    return run\n"
            "candidate = vit_ref.Candidate(load=load)\n"
        )
    before, path = dict(sys.modules), list(sys.path)
    candidates = {name: find(str(tmp_path / name / "port.py")) for name in ("a", "b")}
    for name in ("a", "b", "a"):
        model = load(candidates[name], tmp_path, np.float64)
        with beside_it(candidates[name].directory):
            assert model(1) == (1, *[name] * 4)
        assert sys.path == path
        assert {
            key: before.get(key) for key in ("late", "later", "parts", "json", "vit_ref", "vit_ref_their_model")
        } == {key: sys.modules.get(key) for key in ("late", "later", "parts", "json", "vit_ref", "vit_ref_their_model")}
    # Another project's module of that name stays in place.
    theirs = ModuleType("parts")
    monkeypatch.setitem(sys.modules, "parts", theirs)
    with beside_it(candidates["a"].directory):
        assert sys.modules["parts"] is not theirs
    assert sys.modules["parts"] is theirs
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "port.py").write_text("import vit_ref_their_model")
    with pytest.raises(InputError, match="No module named 'vit_ref_their_model'"):
        find(str(tmp_path / "c" / "port.py"))


def test_two_candidates_of_one_name_have_two_reports(tmp_path: Path, saved: Saved) -> None:
    (tmp_path / "two.py").write_text(
        "import vit_ref\n"
        "def load(checkpoint, dtype): return vit_ref.from_pretrained(checkpoint, dtype=dtype)\n"
        "right = vit_ref.Candidate(load=load)\n"
        "wrong = vit_ref.Candidate(load=load, call=lambda model, images, tap: model(2 * images, tap=tap))\n"
    )
    given = [f"--candidate={tmp_path / 'two.py'}:{name}" for name in ("wrong", "right")]
    arguments = ["-m", "parity", "-q", f"--checkpoint={saved('one-block')}", f"--parity-report={tmp_path / 'r'}"]
    done = run_inside(ROOT, ROOT / SUITE / "test_parity.py", *given, *arguments)
    assert done.returncode == 1 and "2 failed, 2 passed" in done.stdout, done.stdout[-2000:]
    reports = sorted((tmp_path / "r").glob("*.txt"))
    assert len(reports) == 2
    assert ["first divergence" in report.read_text() for report in reports] == [True, False]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, images: Any) -> Any:
        return linen.Dense(23)(images.reshape(len(images), -1))


def untraceable(images: Any) -> Any:
    return jax.jit(lambda x: x if x.sum() > 0 else -x)(images).sum((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"load": lambda path: (Linen(), {"Dense_0": {}})},
            "a dict without 'params': return \\(module, {'params': param",
        ),
        ({"load": lambda path: (Linen(), None)}, "a NoneType without 'params'"),
        ({"load": lambda path: untraceable}, "mine: the forward pass raised TracerBoolConversionError: "),
        (
            {"load": functional(plain), "parameters": {"cls_token": ("cls_token", lambda x: x.foo)}},
            "parameters: cls_token: its selection cannot be applied to a value of shape",
        ),
    ],
)
def test_a_slip_in_a_declaration_is_one_line(how: dict[str, Any], message: str, saved: Saved) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checks(how["load"], saved, **{name: value for name, value in how.items() if name != "load"})
    assert "\n" not in str(caught.value)


def test_a_candidate_is_verified_under_jax_disable_jit(saved: Saved) -> None:
    with jax.disable_jit():
        assert not failures(functional(plain), saved)


def test_the_command_line_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "vit_ref", "verify", "nowhere/at/all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "vit-ref: nowhere/at/all: no such directory or file: correct the path, or give the hub id OWNER/NAME\n",
    )


def test_a_candidates_file_may_change_the_path_of_imports(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text(
        f"import sys\nsys.path.remove({str(tmp_path)!r})\nimport vit_ref\ncandidate = vit_ref.Candidate(load=print)\n"
    )
    path = list(sys.path)
    assert find(str(tmp_path / "port.py")).load is print
    assert sys.path == path
