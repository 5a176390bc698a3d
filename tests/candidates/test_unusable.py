"""Candidates that cannot be found, loaded, run, observed or differentiated: each gets one line that names the fault."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import dot_product_attention as attention_by_name

import vit_ref
from tests.helpers.precisions import precision_of
from vit_ref.errors import InputError, MappingError, TruncatedError
from vit_ref.model import attention
from vit_ref.verify.candidates.casts import Casts
from vit_ref.verify.candidates.jax_candidate import without_casts
from vit_ref.verify.candidates.loading import find, is_torch
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.behaviour import check_behaviour, require_repeatable
from vit_ref.verify.gates import SEMANTIC_RMS, error
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.references.numpy_oracle import NumpyOracle, softmax
from vit_ref.verify.results import Check
from vit_ref.verify.session import check_port, prepare_candidate
from vit_ref.weights import checkpoint, writing
from vit_ref.weights.pretrained import read_configuration

CONFIG = CASES["rectangular"].config
IMAGES = CASES["rectangular"].images()


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("absent.py", None, r"absent.py: this file does not exist"),
        ("broken.py", "def f(:\n", r"broken.py: importing it raised SyntaxError: invalid syntax"),
        ("needs.py", "import vit_ref_absent", "needs.py: importing it raised ModuleNotFoundError: No module named"),
        ("script.py", "raise SystemExit(0)", "script.py: importing it raised SystemExit: 0"),
        ("empty.py", "", r"empty.py: it has no 'candidate': name the candidate as .*empty.py:NAME"),
        ("named.py:other", "candidate = print", r"named.py: it has no 'other'"),
        (
            "number.py",
            "candidate = 3",
            "number: it has the type int: give FILE.py or module:attr as text, a vit_ref.Candidate",
        ),
        (
            "cls.py",
            "class candidate: pass",
            "cls: it has the type type: give FILE.py or module:attr as text, a vit_ref.Candidate",
        ),
        ("vit_ref_absent.ports", None, "vit_ref_absent.ports: importing it raised ModuleNotFoundError"),
        ("not a module", None, "not a module: this is neither a Python file nor the name of a module"),
    ],
)
def test_a_candidate_that_cannot_be_found_is_one_line(
    spec: str, content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file, _, attribute = spec.partition(":")
    if content is not None:
        (tmp_path / file).write_text(content)
    if file.endswith(".py"):
        spec = f"{tmp_path / file}:{attribute}" if attribute else str(tmp_path / file)
    with pytest.raises(InputError, match=message) as caught:
        find(spec)
    assert "\n" not in str(caught.value)


def test_candidates_are_found_by_file_module_and_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "flax", flax)
    # A neighbour is imported, and a file may have the name of a package.
    (tmp_path / "vit_ref_neighbour.py").write_text("class made:\n    @staticmethod\n    def model(x): return x\n")
    (tmp_path / "flax.py").write_text("from vit_ref_neighbour import made\nimport flax.nnx\ncandidate = made.model\n")
    assert find(str(tmp_path / "flax.py")).name == "flax"
    assert sys.modules["flax"] is flax
    assert find(f"{tmp_path / 'flax.py'}:made.model").name == "flax-made.model"
    monkeypatch.syspath_prepend(tmp_path)
    assert find("vit_ref_neighbour:made.model").name == "vit_ref_neighbour-made.model"


def made(candidate: Any, saved: Callable[[str], Path]) -> Any:
    source = checkpoint.read(saved("rectangular"))
    return prepare_candidate(candidate, read_configuration(source), source)


def failing(_: Any) -> Any:
    raise KeyError("no such tensor")


def leaving(_: Any) -> Any:
    sys.exit(0)


def ones(classes: int, x: Any) -> Any:
    return x.sum((1, 2, 3))[:, None] * jnp.ones(classes, x.dtype)


def under_jit(candidate: vit_ref.Candidate) -> vit_ref.Candidate:
    return dataclasses.replace(candidate, call=lambda model, x: jax.jit(lambda x: model(x))(x))


def with_site(path: str) -> Callable[[vit_ref.Candidate], vit_ref.Candidate]:
    return lambda candidate: dataclasses.replace(candidate, sites={path: "norm"})


def changed(change: Callable[[Any], None]) -> Callable[[vit_ref.Candidate], vit_ref.Candidate]:
    """Returns a candidate whose loaded module is changed."""

    def wrap(candidate: vit_ref.Candidate) -> vit_ref.Candidate:
        def load(path: Path) -> Any:
            model: Any = candidate.load(path)
            change(model)
            return model

        return dataclasses.replace(candidate, load=load)

    return wrap


def share(model: Any) -> None:
    model.encoder.layers[1].attention = model.encoder.layers[0].attention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(share),
            r"'encoder.layers.1.attention.*' and 'encoder.layers.0.attention.*' are one module",
        ),
        (lambda c: dataclasses.replace(c, load=failing), "mine: load\\(\\) raised KeyError: 'no such tensor'"),
        (lambda c: dataclasses.replace(c, load=lambda _: failing), "mine: the forward pass raised KeyError: 'no such"),
        (lambda c: dataclasses.replace(c, load=leaving), "mine: load\\(\\) raised SystemExit: 0"),
        (lambda c: dataclasses.replace(c, load=lambda _: leaving), "mine: the forward pass raised SystemExit: 0"),
        (
            lambda c: dataclasses.replace(c, load=lambda _: 3),
            "mine: load\\(\\) returned a int: return one of the models that vit_ref.Candidate lists",
        ),
        (lambda c: dataclasses.replace(c, load=lambda _: dict, sites=None), "mine: the forward pass raised"),
        (
            lambda c: dataclasses.replace(c, load=lambda _: lambda x: {"logits": x}, sites=None),
            "mine: it returned a dict: return an array \\(B, ...\\), or pick one with output=",
        ),
        (
            lambda c: dataclasses.replace(c, load=lambda _: jnp.sum, sites=None),
            "mine: it returned a value of shape \\(\\): return an array",
        ),
        (
            with_site("final_nrm"),
            "has no submodule 'final_nrm' and returns no value of that name; did you mean 'final_",
        ),
        (under_jit, "mine: patches is computed inside the candidate's own jit, vmap or scan"),
    ],
)
def test_a_candidate_that_cannot_be_run_or_seen_is_one_line(
    change: Callable, message: str, locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    candidate = dataclasses.replace(find(locate("nnx_tutorial.py")), name="mine")
    with pytest.raises(InputError, match=message) as caught:
        made(change(candidate), saved).trace(IMAGES, FLOAT64)
    assert "\n" not in str(caught.value)


def drop_live(model: Any) -> None:
    model.encoder.layers[0].mlp.layers[2] = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


class Gathering(nnx.Module):
    def __init__(self) -> None:
        self.mean = nnx.BatchStat(jnp.zeros(33))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.mean.set_value(self.mean.get_value() + x.mean((0, 1)).astype(jnp.float32))
        return x


def gather_statistics(model: Any) -> None:
    model.dropout = Gathering()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_live, "'encoder.layers.0.mlp.layers.2.rngs.count', and its next output: dropout may be active"),
        (gather_statistics, "'dropout.mean': dropout may be active, or statistics be updated"),
    ],
)
def test_a_candidate_in_training_mode_is_reported_first(
    change: Callable[[Any], None],
    message: str,
    locate: Callable[[str], str],
    saved: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error comes before any reference runs."""
    monkeypatch.setattr("vit_ref.verify.session.Session.forward", failing)
    candidate = changed(change)(dataclasses.replace(find(locate("nnx_tutorial.py")), name="mine"))
    with pytest.raises(InputError, match=f"mine: the forward pass changes the model's own state, {message}") as caught:
        check_port(candidate, saved("one-block"))
    assert "\n" not in str(caught.value)


class Scaling(nnx.Module):
    """It holds an array that is no variable."""

    def __init__(self) -> None:
        self.scale = jnp.asarray(1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale.astype(x.dtype)


def test_a_module_may_hold_plain_arrays(locate: Callable[[str], str], saved: Callable[[str], Path]) -> None:
    def hold(model: Any) -> None:
        model.dropout = Scaling()

    candidate = changed(hold)(find(locate("nnx_tutorial.py")))
    assert check_port(candidate, saved("one-block"), backward=False).passed


class Drawing(nnx.Module):
    """It draws from a random stream that was made outside it."""

    def __init__(self, stream: nnx.Rngs):
        self.draw = lambda: stream.dropout()

    def __call__(self, x: jax.Array) -> jax.Array:
        self.draw()
        return x


def test_state_changed_outside_the_candidate_is_reported(
    locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    stream = nnx.Rngs(0)

    def draw(model: Any) -> None:
        model.dropout = Drawing(stream)

    candidate = changed(draw)(dataclasses.replace(find(locate("nnx_tutorial.py")), name="mine"))
    with pytest.raises(InputError, match=r"^mine: the forward pass changes state outside the model \("):
        made(candidate, saved).trace(IMAGES, FLOAT64)


def test_a_function_that_differs_between_runs_is_reported_first(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check_port` and `propose` both report it."""
    monkeypatch.setattr("vit_ref.verify.session.Session.forward", failing)
    monkeypatch.setattr("vit_ref.verify.proposals.proposal.NumpyOracle", failing)
    rng = np.random.default_rng(0)
    for ask in (check_port, vit_ref.propose):
        with pytest.raises(
            InputError, match=r"mine: two runs on the same inputs differ: is dropout live\?.*relative RMS"
        ):
            ask(vit_ref.Candidate(load=lambda _: lambda x: ones(23, x) * rng.normal(), name="mine"), saved("one-block"))


def flipped(model: Any, images: Any) -> Any:
    return (model(images) + model(images[:, :, ::-1])) / 2


FLIPPED = {
    "nnx_tutorial.py": (
        flipped,
        "'patch_embeddings' runs 2 times in one forward pass and shows another value of patch",
    ),
    "linen_big_vision.py": (flipped, "'embedding' runs 2 times in one forward pass"),
    "torch_timm.py": (
        lambda model, images: model(images) + model(images.flip(-1)),
        "'patch_embed' runs 2 times in one",
    ),
}


@pytest.mark.parametrize("file", [pytest.param(f, marks=pytest.mark.torch if "torch" in f else ()) for f in FLIPPED])
def test_a_module_that_runs_twice_is_refused(
    file: str, locate: Callable[[str], str], saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vit_ref.verify.session.Session.forward", failing)
    call, message = FLIPPED[file]
    with pytest.raises(InputError, match=message) as caught:
        check_port(dataclasses.replace(find(locate(file)), call=call), saved("one-block"))
    assert "\n" not in str(caught.value)


def test_a_value_that_is_shown_twice_is_one_value(saved: Callable[[str], Path]) -> None:
    def showing(x: jax.Array, tap: Callable) -> Any:
        norm = tap("norm", tap("norm", jnp.ones((len(x), 17, 33), x.dtype)))
        return ones(23, x) * norm[0, 0, 0], {"norm": norm}

    require_repeatable(made(showing, saved), IMAGES[:1])


def test_unknown_submodules_of_linen_are_named(locate: Callable[[str], str], saved: Callable[[str], Path]) -> None:
    candidate = with_site("encoder_nrm")(find(locate("linen_big_vision.py")))
    with pytest.raises(InputError, match=r"has no submodule 'encoder_nrm'.* did you mean 'encoder_norm'"):
        made(candidate, saved).trace(IMAGES, FLOAT64)


def test_without_a_head_the_returned_cls_token_is_compared(saved: Callable[[str], Path]) -> None:
    source = checkpoint.read(saved("headless"))
    config = read_configuration(source)
    plain = vit_ref.Candidate(
        load=lambda path, dtype: vit_ref.from_pretrained(path, dtype=dtype), name="mine", call=lambda model, x: model(x)
    )
    shown = prepare_candidate(dataclasses.replace(plain, sites={"norm": "norm"}), config, source)
    assert set(shown.trace(CASES["headless"].images(), FLOAT64)) == {"norm", "cls"}
    for call, failed in ((plain.call, []), (lambda model, x: 5 * model(x)[:, ::-1], ["forward/cls"])):
        report = check_port(dataclasses.replace(plain, call=call), source.path, backward=False)
        assert [check.name for check in report.checks if check.status == "failed"] == failed
    tokens = dataclasses.replace(plain, call=lambda model, x: jnp.stack([model(x)] * 3, axis=1))
    with pytest.raises(
        InputError, match=r"^mine: it returned shape \(1, 3, \d+\), but a model without a head must return the cls"
    ):
        check_port(tokens, source.path, backward=False)


def test_a_candidate_with_a_tap_is_observed_only_through_it(saved: Callable[[str], Path]) -> None:
    candidate = vit_ref.Candidate(
        load=lambda path, dtype: vit_ref.from_pretrained(path, dtype=dtype), sites={"blocks.0.norm1": "block.0.norm1"}
    )
    with pytest.raises(InputError, match=r"has no submodule 'blocks.0.norm1'.* did you mean 'block.0.norm1'"):
        made(candidate, saved).trace(IMAGES, FLOAT64)
    around = dataclasses.replace(candidate, call=lambda model, x: model(x))
    assert set(made(around, saved).trace(IMAGES, FLOAT64)) == {"block.0.norm1", "logits"}


def test_submodules_and_intermediates_may_be_combined(
    locate: Callable[[str], str], saved: Callable[[str], Path]
) -> None:
    candidate = dataclasses.replace(
        find(locate("nnx_tutorial.py")),
        sites={"final_norm": "norm", "squares": "patches"},
        call=lambda model, x: (model(x), {"squares": model.patch_embeddings(x)}),
    )
    shown = made(candidate, saved)
    trace = shown.trace(IMAGES, FLOAT64)
    assert {site: value.shape for site, value in trace.items()} == {
        "norm": (5, 17, 33),
        "patches": (5, 16, 33),
        "logits": (5, 23),
    }
    assert shown.fixed == {"patches"}


def checks_of(function: Callable, saved: Callable[[str], Path], *, backward: bool = False) -> dict[str, Check]:
    report = check_port(function, saved("one-block"), backward=backward)
    return {check.name: check for check in report.checks}


def failures_of(function: Callable, saved: Callable[[str], Path]) -> dict[str, str]:
    return {each.name: each.reason for each in check_behaviour(made(function, saved), IMAGES[:2]) if not each.passed}


def test_a_candidate_that_stays_in_float32_is_refused(saved: Callable[[str], Path]) -> None:
    def narrow(x: jax.Array) -> jax.Array:
        return ones(23, jnp.asarray(np.asarray(x, np.float32)))

    with pytest.raises(TruncatedError, match=r"narrow must compute in float64, but 1 of 1 sites do not, first logi"):
        checks_of(narrow, saved)


def test_a_candidate_with_float32_at_one_site_fails_there(saved: Callable[[str], Path]) -> None:
    def narrow(x: jax.Array, tap: Callable = lambda name, value: value) -> jax.Array:
        patches = tap("patches", jnp.ones((len(x), 16, 33), jnp.float32))
        return ones(23, x) + patches.mean().astype(x.dtype)

    checks = checks_of(narrow, saved, backward=True)
    for name in ("forward/patches", "backward/patches"):
        assert checks[name].status == "failed" and checks[name].reason.startswith("float64 relative RMS"), name


def test_a_right_numpy_candidate_passes_and_fails_to_compile(saved: Callable[[str], Path]) -> None:
    source = checkpoint.read(saved("one-block"))
    oracle = NumpyOracle(read_configuration(source), source.tensors)
    checks = checks_of(lambda x: oracle.trace(np.asarray(x))["logits"], saved, backward=True)
    assert checks["forward/logits"].status == "passed"
    assert checks["behaviour/jit"].status == "failed"
    assert checks["behaviour/jit"].reason.startswith("jax cannot trace it (TracerArrayConversionError)")
    assert checks["behaviour/repeat"].status == checks["behaviour/batch"].status == "passed"
    assert checks["backward/pixels"].status == "not observed"
    assert "it cannot be differentiated" in checks["backward/pixels"].reason


def test_a_candidate_in_float32_inside_is_reported(saved: Callable[[str], Path]) -> None:
    def narrow(x: jax.Array) -> jax.Array:
        # Scaled by a value of the whole batch, which rounds differently for each batch.
        scale = 1 + x.mean() ** 2
        return rounded(ones(23, x) * scale) / rounded(scale)

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)

    reason = failures_of(narrow, saved)["batch"]
    assert re.fullmatch(r"an input alone .* \(by \de-0[678]: a part of it may be float32 and not float64\)", reason)


def test_a_candidate_whose_images_depend_on_each_other_fails(saved: Callable[[str], Path]) -> None:
    assert failures_of(lambda x: ones(23, x - x.mean(axis=0)), saved) == {
        "batch": "an input alone gives another output than in its batch"
    }


@pytest.mark.parametrize("output", [lambda x: ones(23, x) * jnp.nan, lambda x: ones(23, x)[:0]], ids=["NaN", "empty"])
def test_a_constantly_wrong_candidate_repeats_its_values(output: Callable, saved: Callable[[str], Path]) -> None:
    checks = checks_of(output, saved)
    assert [name for name, check in checks.items() if check.status == "failed"] == ["forward/logits"]


def test_a_candidate_that_differs_when_compiled_fails(saved: Callable[[str], Path]) -> None:
    assert failures_of(lambda x: ones(23, x) * (2 if isinstance(x, jax.core.Tracer) else 1), saved) == {
        "jit": "its output is another if it is compiled than if it runs operation by operation"
    }


def test_a_candidate_that_differs_between_runs_fails(saved: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(0)
    # float() cannot be traced, so numpy draws again in each run.
    failures = failures_of(lambda x: ones(23, x) + float(x[0, 0, 0, 0]) * rng.normal(), saved)
    assert failures["repeat"].startswith("two runs on the same inputs differ")


def test_a_model_that_differs_without_a_tap_fails(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes attention's probabilities only for a tap, so users run another path."""
    monkeypatch.setattr(
        "vit_ref.model.vit.attend", lambda query, key, value: attention.weigh(1.001 * query, key, value)
    )
    report = check_port(None, saved("one-block"), backward=False)
    (failed,) = (check for check in report.checks if check.status == "failed")
    assert failed.name == "behaviour/untapped"
    assert failed.reason.startswith("its output is another without a tap")


def test_without_a_tap_a_candidate_is_called_as_by_its_users(saved: Callable[[str], Path]) -> None:
    def fused(x: jax.Array, tap: Callable | None = None) -> jax.Array:
        return ones(23, x) if tap is None else tap("logits", 2 * ones(23, x))

    def needing(x: jax.Array, tap: Callable) -> jax.Array:
        return tap("logits", ones(23, x))

    assert list(failures_of(fused, saved)) == ["untapped"]
    assert failures_of(needing, saved) == {}

    class Fused(nnx.Module):
        def __call__(self, x: jax.Array, tap: Callable | None = None) -> jax.Array:
            return fused(x, tap)

    assert list(failures_of(Fused(), saved)) == ["untapped"]

    def lacking(x: jax.Array, tap: Any = None) -> jax.Array:
        return tap("logits", ones(23, x))

    (reason,) = failures_of(lacking, saved).values()
    assert reason.startswith("without a tap lacking: the forward pass raised TypeError: 'NoneType' object is not call")


def test_a_candidate_that_drops_the_axis_of_one_image_fails(saved: Callable[[str], Path]) -> None:
    assert list(failures_of(lambda x: ones(23, x).squeeze(), saved)) == ["batch"]


def test_state_kept_by_an_uncompiled_pass_is_detected(saved: Callable[[str], Path]) -> None:
    kept: list[jax.Array] = []

    def keeping(x: jax.Array) -> jax.Array:
        if isinstance(x, jax.core.Tracer):
            return ones(23, x)
        kept.append(ones(23, x))
        return kept[0] * jnp.ones((len(x), 1))

    assert list(failures_of(keeping, saved)) == ["jit"]


FAULTY = {
    "unexpected: vit.encoder.layer.1.attention.attention.key.bias": {"num_hidden_layers": 1},
    "misshapen: classifier.weight": {"classifier.weight": lambda kernel: kernel[:, 1:]},
    "not finite: classifier.bias": {"classifier.bias": lambda bias: bias * np.nan},
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_contradictory_checkpoint_is_not_the_candidates_fault(fault: str, tmp_path: Path) -> None:
    source, changes = CASES["rectangular"].checkpoint(), FAULTY[fault]
    tensors = {name: changes.get(name, lambda x: x)(tensor) for name, tensor in source.tensors.items()}
    numbers = {name: value for name, value in changes.items() if isinstance(value, int)}
    writing.write_directory(tmp_path, tensors, {**(source.config or {}), **numbers})
    with pytest.raises(MappingError, match=re.escape(fault)):
        check_port(lambda x: ones(23, x), tmp_path, backward=False)


def test_unexpected_tensors_outside_the_blocks_are_allowed(tmp_path: Path) -> None:
    source = CASES["rectangular"].checkpoint()
    tensors = {**source.tensors, "vit.pooler.dense.bias": np.zeros(33, np.float32)}
    writing.write_directory(tmp_path, tensors, source.config or {})
    assert check_port(lambda x: ones(23, x), tmp_path, backward=False).forward.semantic_failures


def test_a_candidate_that_writes_into_jax_images_is_one_line(saved: Callable[[str], Path]) -> None:
    def centred(x: Any) -> Any:
        x = np.asarray(x)
        x -= x.mean()
        return x

    with pytest.raises(InputError, match=r"centred: the forward pass raised ValueError: output array is read-only"):
        check_behaviour(made(centred, saved), IMAGES)


def test_logits_of_a_wrong_shape_fail_without_gradients(saved: Callable[[str], Path]) -> None:
    checks = checks_of(lambda x: ones(1, x), saved, backward=True)
    assert checks["forward/logits"].status == "failed"
    assert checks["backward/pixels"].reason.startswith("its output has shape (2, 1) and not (2, 23)")


def test_a_candidate_without_a_derivative_is_verified_forward(saved: Callable[[str], Path]) -> None:
    def calling_back(x: jax.Array) -> jax.Array:
        # It does not use its argument: jax may call back on a thread where float64 is not enabled, and pass float32.
        given = np.ones((len(x), 23), x.dtype)
        return jax.pure_callback(lambda _: given, jax.ShapeDtypeStruct(given.shape, x.dtype), ones(23, x))

    checks = checks_of(calling_back, saved, backward=True)
    assert checks["forward/logits"].status == "failed"
    assert checks["behaviour/jit"].status == "passed"
    assert checks["backward/pixels"].status == "not observed"
    assert checks["backward/pixels"].reason.startswith("jax cannot differentiate it: calling_back: the forward pass")


def test_a_loader_with_a_dtype_argument_receives_the_dtype(saved: Callable[[str], Path]) -> None:
    told = []

    def load(path: Path, dtype: np.dtype) -> Callable:
        told.append((path, dtype))
        return lambda x: ones(23, x).astype(dtype)

    model = made(vit_ref.Candidate(load=load), saved)
    for dtype in (np.float64, np.float64, np.float32):
        assert model.trace(IMAGES, precision_of(dtype))["logits"].dtype == dtype
    # Each is loaded once, though it is used twice, because reading a checkpoint takes seconds.
    assert told == [(saved("rectangular"), np.dtype(np.float64)), (saved("rectangular"), np.dtype(np.float32))]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"mask": True}, {"bias": True}])
def test_fused_attention_is_exact_only_in_float64(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    with precision_of(np.float64).active():
        query, key, value = (jnp.asarray(rng.normal(size=(2, 5, 3, 7))) for _ in range(3))
        if "mask" in options:
            options = {"mask": jnp.asarray(rng.random((2, 3, 5, 5)) < 0.7).at[..., 0].set(True)}
        if "bias" in options:
            options = {"bias": jnp.asarray(rng.normal(size=(2, 3, 5, 5)))}
        scores = jnp.einsum("bqhk,bmhk->bhqm", query, key) * options.get("scale", 7**-0.5) + options.get("bias", 0)
        scores = jnp.where(options["mask"], scores, -jnp.inf) if "mask" in options else scores
        expected = np.einsum("bhqm,bmhk->bqhk", jax.nn.softmax(scores), value)
        fused = jax.nn.dot_product_attention(query, key, value, **options)
        by_default = partial(jax.nn.dot_product_attention, **options)
        with without_casts(np.float64, Casts()):
            found = [
                jax.nn.dot_product_attention(query, key, value, **options),
                by_default(query, key, value),
                by_default(query, key, value, implementation="cudnn"),
                attention_by_name(query, key, value, **options),
                jax.vmap(partial(attention_by_name, scale=options.get("scale")))(
                    query, key, value, options.get("bias"), options.get("mask")
                ),
            ]
        # The rounding of a sum of five products. The float32 rounding inside the fused softmax is larger.
        for each in found:
            np.testing.assert_allclose(each, expected, rtol=0, atol=1e-14)
        assert np.abs(fused - expected).max() > 1e-10
        np.testing.assert_array_equal(jax.nn.dot_product_attention(query, key, value, **options), fused)
        with without_casts(np.float32, Casts()):
            np.testing.assert_array_equal(jax.nn.dot_product_attention(query, key, value, **options), fused)


def narrow_softmax(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)


def narrow_norm(x: jax.Array) -> jax.Array:
    return nnx.LayerNorm(x.shape[-1], epsilon=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))(x).astype(x.dtype)


def centred(x: Any) -> Any:
    return x - x.mean(-1, keepdims=True)


# Code that computes in float32 by design, and the same in NumPy.
IN_FLOAT32: dict[str, tuple[Callable, Callable]] = {
    "softmax": (narrow_softmax, softmax),
    "mean": (lambda x: x - x.mean(-1, keepdims=True, dtype=jnp.float32), centred),
    "product": (
        lambda x: jnp.matmul(x, x.mT, preferred_element_type=jnp.float32).astype(x.dtype),
        lambda x: x @ x.swapaxes(-1, -2),
    ),
    "layer": (narrow_norm, lambda x: centred(x) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)),
    "under checkpoint": (jax.checkpoint(narrow_softmax), softmax),
    "under vmap": (jax.vmap(narrow_softmax), softmax),
    "under jit": (jax.jit(narrow_softmax), softmax),
}


@pytest.mark.parametrize("what", IN_FLOAT32)
def test_a_candidate_float32_by_design_is_exact_in_float64(what: str, saved: Callable[[str], Path]) -> None:
    narrow, right = IN_FLOAT32[what]

    def forward(x: jax.Array) -> jax.Array:
        y = narrow(x.reshape(len(x), -1, 8))
        return jnp.square(y + 1).sum((1, 2))[:, None] * jnp.ones(23, y.dtype)

    model = made(forward, saved)
    (found,) = model.outputs([IMAGES], FLOAT64, tap=lambda site, value: value)
    expected = np.square(1 + right(IMAGES.astype(np.float64).reshape(len(IMAGES), -1, 8))).sum((1, 2))[:, None]
    with precision_of(np.float64).active():
        rounded = np.asarray(forward(jnp.asarray(IMAGES, np.float64)))
    assert 1e-10 < error(rounded[:, :1], expected).rms < 1e-5
    assert error(found[:, :1], expected).rms < SEMANTIC_RMS
    (note,) = model.notes
    assert "to float32, the first before logits. This rounding is undone for the float64 gate" in note


def test_a_candidate_that_needs_its_casts_keeps_them(saved: Callable[[str], Path]) -> None:
    def scanning(x: jax.Array) -> jax.Array:
        # The carry is float32, so the added value must be, too.
        rows = jnp.moveaxis(x, 1, 0).astype(jnp.float32)
        total, _ = jax.lax.scan(lambda carry, row: (carry + row, None), jnp.zeros(rows.shape[1:], jnp.float32), rows)
        return ones(23, total[:, None]).astype(x.dtype)

    model = made(scanning, saved)
    (found,) = model.outputs([IMAGES], FLOAT64, tap=lambda site, value: value)
    assert error(found[:, 0], IMAGES.sum((1, 2, 3))).rms < 1e-5
    assert model.notes == ()


def test_shapes_without_values_are_one_line(locate: Callable[[str], str], saved: Callable[[str], Path]) -> None:
    tutorial = find(locate("nnx_tutorial.py"))
    abstract = dataclasses.replace(tutorial, load=lambda path: nnx.eval_shape(lambda: tutorial.load(path)))
    with pytest.raises(InputError, match=r"nnx_tutorial: 'classifier.bias\S*' has a shape but no values") as caught:
        made(abstract, saved).trace(IMAGES, FLOAT64)
    assert "\n" not in str(caught.value)


def test_pytorch_is_not_imported_for_other_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert not is_torch(object())
    assert "torch" not in sys.modules


def test_an_exception_names_the_line_of_the_persons_own_file(tmp_path: Path, saved: Callable[[str], Path]) -> None:
    (tmp_path / "beside.py").write_text("import json\n\n\ndef parse():\n    return json.loads('{')\n")
    (tmp_path / "mine.py").write_text(
        "import vit_ref\n"
        "def load(checkpoint):\n"
        "    return forward\n"
        "def forward(images):\n"
        "    import beside\n"
        "    return beside.parse()\n"
        "candidate = vit_ref.Candidate(load=load)\n"
        "reading = vit_ref.Candidate(load=lambda checkpoint: open(checkpoint / 'lost'))\n"
    )
    (tmp_path / "broken.py").write_text("import os\nos.stat('/no/such/file')\n")
    (tmp_path / "wrong.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "importing.py").write_text("import wrong\n")
    for spec, message in (
        ("mine.py", r"mine: the forward pass raised JSONDecodeError: .* \(beside\.py, line 5\)$"),
        ("mine.py:reading", r"mine-reading: load\(\) raised \w+Error: .* \(mine\.py, line 8\)$"),
        ("broken.py", r"broken\.py: importing it raised FileNotFoundError: .* \(broken\.py, line 2\)$"),
        ("wrong.py", r"wrong\.py: importing it raised SyntaxError: invalid syntax \(wrong\.py, line 2\)$"),
        ("importing.py", r"importing\.py: importing it raised SyntaxError: invalid syntax \(wrong\.py, line 2\)$"),
    ):
        with pytest.raises(InputError, match=message):
            check_port(str(tmp_path / spec), saved("one-block"))
