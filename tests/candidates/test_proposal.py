"""Does `propose` find the tables that a person would write, and say what it could not find?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import linen, nnx
from jax import Array
from numpy.typing import NDArray

import vit_ref
from vit_ref.cli.commands import main
from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import BLOCK_SITES
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.table import gradients_by_path
from vit_ref.verify.candidates.vit_outline import ViTOutline
from vit_ref.verify.cases import CASES
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.proposals import proposal
from vit_ref.verify.proposals.listing import Proposal
from vit_ref.verify.proposals.matching import Search
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.session import prepare_candidate
from vit_ref.weights import checkpoint, mapping, writing
from vit_ref.weights.pretrained import read_configuration

CASE = CASES["rectangular"]
D, HEADS, DEPTH = CASE.config.hidden_size, CASE.config.num_attention_heads, CASE.config.num_hidden_layers
NAMES = ["patches", "embeddings", *(f"block.{{i}}.{site}" for site, _ in BLOCK_SITES), "norm"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.write(tmp_path_factory.mktemp("candidates") / "rectangular").path


# A candidate in the style of tutorials: nnx's own attention, an MLP in a Sequential, an encoder in another.


class Encoder(nnx.Module):
    def __init__(self, config: ViTConfig, activation: Callable[[Array], Array], rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1 = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(config.num_attention_heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, config.intermediate_size, rngs=rngs),
            activation,
            nnx.Dropout(0.1, deterministic=True),
            nnx.Linear(config.intermediate_size, width, rngs=rngs),
            nnx.Dropout(0.1, deterministic=True),
        )

    def __call__(self, x: Array) -> Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tutorial(nnx.Module):
    def __init__(self, config: ViTConfig, activation: Callable[[Array], Array], positions: bool, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_hw
        self.embed = nnx.Conv(config.num_channels, width, patch, strides=patch, padding="VALID", rngs=rngs)
        rows, columns = config.grid()
        self.cls = nnx.Param(jnp.zeros((width,)))
        self.positions = nnx.Param(jnp.zeros((rows * columns + 1, width)))
        self.dropout = nnx.Dropout(0.1, deterministic=True)
        self.encoder = nnx.Sequential(*(Encoder(config, activation, rngs) for _ in range(config.num_hidden_layers)))
        self.final_norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.classifier = nnx.Linear(width, config.num_labels, rngs=rngs)
        self.adds_positions = positions

    def __call__(self, images: Array) -> Array:
        x = self.embed(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])), x], axis=1)
        x = self.dropout(x + self.positions[...] if self.adds_positions else x)
        return self.classifier(self.final_norm(self.encoder(x))[:, 0])


TUTORIAL_SITES = {
    "embed": "patches",
    "dropout": "embeddings",
    "encoder.layers.{i}.norm1": "block.{i}.norm1",
    "encoder.layers.{i}.attn.query": "block.{i}.attn.query",
    "encoder.layers.{i}.attn.key": "block.{i}.attn.key",
    "encoder.layers.{i}.attn.value": "block.{i}.attn.value",
    "encoder.layers.{i}.attn.out:input": "block.{i}.attn.context",
    "encoder.layers.{i}.attn": "block.{i}.attn.out",
    "encoder.layers.{i}.norm2:input": "block.{i}.attn.residual",
    "encoder.layers.{i}.norm2": "block.{i}.norm2",
    "encoder.layers.{i}.mlp.layers.0": "block.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.layers.2": "block.{i}.mlp.hidden",
    "encoder.layers.{i}.mlp": "block.{i}.mlp.out",
    "encoder.layers.{i}": "block.{i}.mlp.residual",
    "final_norm": "norm",
}
TUTORIAL_LAYERS = {
    "patch": "embed",
    **{f"blocks.{{i}}.{name}": f"encoder.layers.{{i}}.{name}" for name in ("norm1", "norm2")},
    **{f"blocks.{{i}}.attn.{name}": f"encoder.layers.{{i}}.attn.{name}" for name in ("query", "key", "value", "out")},
    "blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.layers.0",
    "blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.layers.3",
    "norm": "final_norm",
    "head": "classifier",
}
TUTORIAL_PARAMETERS = {
    "cls": "cls_token",
    "positions": "position_embeddings",
    **{
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for ours, theirs in TUTORIAL_LAYERS.items()
        for leaf in (("scale", "bias") if "norm" in ours else ("kernel", "bias"))
    },
}


def _ported(directory: Path) -> tuple[ViTConfig, dict[str, NDArray]]:
    source = checkpoint.read(directory)
    config = read_configuration(source)
    return config, mapping.port(source.tensors, config, mapping.detect(source.tensors))


def tutorial(
    activation: Callable[[Array], Array] = lambda x: nnx.gelu(x, approximate=False),
    *,
    positions: bool = True,
    change: Callable[[dict[str, NDArray]], None] = lambda parameters: None,
) -> Candidate:
    def load(directory: Path) -> nnx.Module:
        config, parameters = _ported(directory)
        named = {
            theirs.replace("{i}", str(i)): np.array(parameters[ours.replace("{i}", str(i))])
            for theirs, ours in TUTORIAL_PARAMETERS.items()
            for i in range(config.num_hidden_layers)
        }
        change(named)
        graph, state = nnx.split(nnx.eval_shape(lambda: Tutorial(config, activation, positions, nnx.Rngs(0))))
        filled = [
            (path, leaf.replace(jnp.asarray(named[".".join(map(str, path))]).reshape(leaf.shape)))
            for path, leaf in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(filled))

    return Candidate(load=load, name="tutorial")


# A function can show any other value, because it takes its values from the oracle.


def showing(
    show: Callable[[Trace], Mapping[str, Any]],
    parameters: Callable[[dict[str, NDArray]], dict[str, NDArray]] | None = None,
    **fields: Any,
) -> Candidate:
    """A candidate that shows `show(trace)` of a model in which `fields` differ."""

    def load(directory: Path) -> Any:
        source = checkpoint.read(directory)
        oracle = NumpyOracle(dataclasses.replace(read_configuration(source), **fields), source.tensors)

        def forward(pixels: Any) -> tuple[NDArray, Mapping[str, Any]]:
            trace = oracle.trace(np.asarray(pixels))
            return trace["logits"], show(trace)

        if parameters is None:
            return forward
        return lambda given, pixels: forward(pixels), parameters(_ported(directory)[1])

    return Candidate(load=load, name="shown")


def blocks(show: Callable[[Callable[[str], NDArray]], Mapping[str, Any]]) -> Callable[[Trace], Mapping[str, Any]]:
    """Applies `show` to each block's sites, with the keys under "layer_0." and so on."""

    def shown(trace: Trace) -> Mapping[str, Any]:
        return {
            f"layer_{i}.{name}": value
            for i in range(DEPTH)
            for name, value in show(lambda site, i=i: trace[f"block.{i}.{site}"]).items()
        }

    return shown


def stacked(trace: Trace, site: str) -> NDArray:
    return np.stack([trace[f"block.{i}.{site}"] for i in range(DEPTH)])


def entries(mapped: Mapping[str, Any] | None) -> list[tuple[str, str, Any]]:
    """Returns (key, target, selection) of a table, one by one."""
    found: list[tuple[str, str, Any]] = []
    for key, targets in (mapped or {}).items():
        several = targets if isinstance(targets, list) else [targets]
        found += [(key, *(target if isinstance(target, tuple) else (target, None))) for target in several]
    return found


def pairs(mapped: Mapping[str, Any] | None) -> dict[str, str]:
    return {target: key for key, target, _ in entries(mapped)}


def assert_can_be_pasted(proposal: Proposal, shape: tuple[int, ...] = (6, 6, 6, 18)) -> None:
    """The printed code makes the proposal's own tables, with selections, in lines that fit a page."""
    namespace: dict[str, Any] = {}
    exec(str(proposal), namespace)
    x = np.arange(np.prod(shape)).reshape(shape)
    for name in ("sites", "parameters"):
        printed, own = entries(namespace[name]), entries(getattr(proposal, name))
        assert [entry[:2] for entry in printed] == [entry[:2] for entry in own]
        for (*_, theirs), (*_, ours) in zip(printed, own, strict=True):
            assert (theirs is None) == (ours is None)
            if ours is not None:
                np.testing.assert_array_equal(theirs(x), ours(x))
    assert max(map(len, str(proposal).splitlines())) <= 120


def assert_shown_as_the_oracle_has_them(candidate: Candidate, directory: Path, sites: set[str]) -> None:
    source = checkpoint.read(directory)
    config, pixels = read_configuration(source), CASE.images()
    seen = prepare_candidate(candidate, config, source).trace(pixels, FLOAT64)
    assert seen.keys() == {*sites, "logits"}
    truth = NumpyOracle(config, source.tensors).trace(pixels)
    for site, value in seen.items():
        # The value is moved, but not used in the computation.
        np.testing.assert_array_equal(value, truth[site])


def assert_passes(candidate: Candidate, proposal: Proposal, directory: Path, unseen: set[str]) -> None:
    judged = dataclasses.replace(candidate, sites=proposal.sites, parameters=proposal.parameters)
    report = vit_ref.check_port(judged, directory, backward=False)
    assert report.passed
    not_observed = {check.site for check in report.checks if check.status == "not observed"}
    assert not_observed - {"pixels"} == {f"block.{i}.{site}" for i in range(DEPTH) for site in unseen}
    # The table of parameters is checked on the parameters themselves, because gradients take a minute to compile.
    config, ours = _ported(directory)
    found = gradients_by_path(
        proposal.parameters,
        ViTOutline(config),
        prepare_candidate(judged, config, checkpoint.read(directory)).parameters(),
    )
    assert found.keys() == ours.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, ours[path])


@pytest.fixture(scope="module")
def proposed(directory: Path) -> Proposal:
    return vit_ref.propose(tutorial(), directory)


def test_the_table_of_a_module_is_the_handwritten_one(proposed: Proposal) -> None:
    assert proposed.sites == TUTORIAL_SITES
    assert proposed.parameters == TUTORIAL_PARAMETERS


def test_a_candidate_passes_with_its_proposed_table(directory: Path, proposed: Proposal) -> None:
    assert_passes(tutorial(), proposed, directory, unseen={"attn.probs"})


def test_a_proposal_names_what_its_code_leaves_out(proposed: Proposal) -> None:
    assert proposed.unshown == ("block.{i}.attn.probs",)
    assert "# Sites without a value in the candidate: block.{i}.attn.probs" in str(proposed).splitlines()
    assert not (proposed.unused or proposed.unowned or proposed.unused_parameters or proposed.diverges)
    assert_can_be_pasted(proposed)


def test_the_command_writes_the_table_for_machines(
    proposed: Proposal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(proposal, "propose", lambda *given: calls.append(given) or proposed)
    command = ["propose", "there", "--candidate", "mine", "--json", str(tmp_path / "a.json")]
    ended = CliRunner().invoke(main, command)
    assert (ended.exit_code, calls) == (0, [("mine", "there")])
    assert ended.stdout == f"{proposed}\n"
    content = json.loads((tmp_path / "a.json").read_text())
    assert {each["key"]: each["target"] for each in content["sites"]} == TUTORIAL_SITES
    assert {each["key"]: each["target"] for each in content["parameters"]} == TUTORIAL_PARAMETERS
    assert all(each["equal"] for each in content["sites"] + content["parameters"])
    assert (content["unshown"], content["diverges"]) == (["block.{i}.attn.probs"], None)


def test_a_command_without_checkpoint_takes_the_embedded_case(
    proposed: Proposal, monkeypatch: pytest.MonkeyPatch
) -> None:
    configurations = []

    def propose(candidate: str, checkpoint: Path) -> Proposal:
        configurations.append(json.loads((checkpoint / "config.json").read_text())["image_size"])
        return proposed

    monkeypatch.setattr(proposal, "propose", propose)
    ended = CliRunner().invoke(main, ["propose", "--candidate", "mine"])
    assert ended.exit_code == 0, ended.output
    assert configurations == [list(CASES["rectangular"].config.image_size)]


def test_the_outermost_of_equal_outputs_is_chosen(proposed: Proposal) -> None:
    hidden = next(match for match in proposed.site_matches if match.target == "block.{i}.mlp.out")
    assert hidden.reading.key == "encoder.layers.{i}.mlp"
    assert hidden.also == (
        "encoder.layers.{i}.mlp.layers.3",
        "encoder.layers.{i}.mlp.layers.4",
        "encoder.layers.{i}.mlp.layers.4:input",
    )
    assert "same value as encoder.layers.{i}.mlp.layers.3," in str(proposed)


# A wrong candidate gets the table of the right one, and unequal entries are marked.


def _keys_and_queries_change_places(parameters: dict[str, NDArray]) -> None:
    query, key = (f"encoder.layers.1.attn.{name}.kernel" for name in ("query", "key"))
    parameters[query], parameters[key] = parameters[key], parameters[query]


def _a_bias_is_not_loaded(parameters: dict[str, NDArray]) -> None:
    for i in range(DEPTH):
        parameters[f"encoder.layers.{i}.mlp.layers.0.bias"][:] = 0


def _a_norm_is_not_finite(parameters: dict[str, NDArray]) -> None:
    parameters["encoder.layers.1.norm1.scale"][:] = np.nan


@pytest.mark.parametrize(
    ("wrong", "diverges", "remark"),
    [
        (
            {"activation": jax.nn.gelu},
            "block.0.mlp.hidden",
            "# close, not equal (2e-04), matched by its parameters; same value as encoder.layers.{i}.mlp.layers.2",
        ),
        (
            {"positions": False},
            "embeddings",
            "not equal (4e-01), matched by its parameters; same value as dropout:input,",
        ),
        (
            {"change": _keys_and_queries_change_places},
            "block.1.attn.query",
            '"encoder.layers.{i}.attn.query": "block.{i}.attn.query",  # not equal from block 1 on (1e+00)',
        ),
        (
            {"change": _keys_and_queries_change_places},
            "block.1.attn.query",
            "# not equal from block 1 on (1e+00); encoder.layers.1.attn.key.kernel is equal in block 1",
        ),
        (
            {"change": _a_bias_is_not_loaded},
            "block.0.mlp.fc1",
            '"encoder.layers.{i}.mlp.layers.0.bias": "blocks.{i}.mlp.fc1.bias",'
            "  # not equal (1e+00), matched by its parameters",
        ),
    ],
)
def test_a_wrong_candidate_gets_the_whole_table_and_a_warning(
    directory: Path, proposed: Proposal, wrong: dict[str, Any], diverges: str, remark: str
) -> None:
    found = vit_ref.propose(tutorial(**wrong), directory)
    assert found.sites == proposed.sites
    assert found.parameters == proposed.parameters
    assert (found.unused, found.diverges) == ((), diverges)
    assert f"# From {diverges} on the values differ" in str(found)
    assert remark in str(found)
    assert_can_be_pasted(found)


def test_a_value_not_finite_equals_nothing(directory: Path, proposed: Proposal) -> None:
    found = vit_ref.propose(tutorial(change=_a_norm_is_not_finite), directory)
    assert (found.sites, found.parameters) == (proposed.sites, proposed.parameters)
    assert found.diverges == "block.1.norm1"
    assert '"encoder.layers.{i}.norm1.scale": "blocks.{i}.norm1.scale",  # not equal from block 1 on (inf)' in str(
        found
    )


def test_without_parameters_only_a_close_value_is_proposed(directory: Path) -> None:
    def show(trace: Trace) -> Mapping[str, Any]:
        return {
            "hidden": stacked(trace, "mlp.hidden"),
            "stream": stacked(trace, "mlp.residual"),
            "doubled": 2 * stacked(trace, "mlp.out"),
        }

    found = vit_ref.propose(showing(show, hidden_act="gelu_new"), directory)
    assert pairs(found.sites) == {"block.{i}.mlp.hidden": "hidden", "block.{i}.mlp.residual": "stream"}
    assert found.diverges == "block.0.mlp.hidden"
    assert '"hidden": "block.{i}.mlp.hidden",  # close, not equal (2e-04)' in str(found)
    assert found.unused == ("doubled",)


def test_leftovers_of_all_blocks_are_named_once(directory: Path) -> None:
    show = blocks(lambda get: {"extra.0": np.zeros(3), "extra.1": np.ones(3)})
    assert vit_ref.propose(showing(show), directory).unused == ("layer_{i}.extra.0", "layer_{i}.extra.1")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        # This value is near to both, and nearer to one.
        ({"x": 1e-4}, {"embeddings": "x"}),
        # The only other value nearby is known to be something else.
        ({"x": 0.0, "y": 0.008}, {"embeddings": "x", "norm": "y"}),
        # The other value is not known to be something else.
        ({"x": 0.001, "y": 0.008}, {}),
    ],
)
def test_two_sites_that_differ_little_are_distinguished(shown: dict[str, float], expected: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    base, step = rng.normal(size=(2, 3, 17, D))
    search = Search(
        {key: base + distance * step for key, distance in shown.items()},
        {"norm": base + 0.01 * step, "embeddings": base},
        CASE.config,
    )
    search.run(lambda site: ())
    search.run(lambda site: (), guess=True)
    assert {target: match.reading.key for target, match in search.matches.items()} == expected


def test_two_values_that_are_equally_near_leave_a_site_unmatched(directory: Path) -> None:
    def show(trace: Trace) -> Mapping[str, Any]:
        return {"one": trace["norm"] + 1e-3, "other": trace["norm"] - 1e-3}

    found = vit_ref.propose(showing(show), directory)
    assert found.sites == {}
    assert "norm" in found.unshown
    assert "# Values of the candidate that match no site: one, other" in str(found)


# Values in other shapes, and several values in one.


def flat(value: NDArray) -> NDArray:
    return value.reshape(*value.shape[:2], -1)


def fused(get: Callable[[str], NDArray], *names: str) -> list[NDArray]:
    return [get(f"attn.{name}") for name in names]


ROWS, COLUMNS = CASE.config.grid()
FORMS: dict[str, tuple[Callable[[Trace], Mapping[str, Any]], dict[str, tuple[str, str]]]] = {
    "heads first": (
        blocks(lambda get: {"query": get("attn.query").swapaxes(1, 2)}),
        {"block.{i}.attn.query": ("layer_{i}.query", "x.swapaxes(1, 2)")},
    ),
    "heads merged": (
        blocks(lambda get: {"query": flat(get("attn.query"))}),
        {"block.{i}.attn.query": ("layer_{i}.query", "")},
    ),
    "tokens first": (
        lambda trace: {"last": trace["norm"].swapaxes(0, 1)},
        {"norm": ("last", "x.swapaxes(0, 1)")},
    ),
    "channels first": (
        lambda trace: {"conv": trace["patches"].swapaxes(1, 2).reshape(-1, D, ROWS, COLUMNS)},
        {"patches": ("conv", "x.swapaxes(1, 2).swapaxes(2, 3)")},
    ),
    "a map": (
        lambda trace: {"conv": trace["patches"].reshape(-1, ROWS, COLUMNS, D), "mask": np.ones((2, 3), int)},
        {"patches": ("conv", "")},
    ),
    "thirds in another order": (
        blocks(lambda get: {"kqv": np.concatenate([flat(x) for x in fused(get, "key", "query", "value")], axis=-1)}),
        {
            "block.{i}.attn.query": ("layer_{i}.kqv", "x[..., x.shape[-1] // 3 : 2 * x.shape[-1] // 3]"),
            "block.{i}.attn.key": ("layer_{i}.kqv", "x[..., : x.shape[-1] // 3]"),
            "block.{i}.attn.value": ("layer_{i}.kqv", "x[..., 2 * x.shape[-1] // 3 :]"),
        },
    ),
    "halves": (
        blocks(lambda get: {"kv": np.concatenate([flat(x) for x in fused(get, "key", "value")], axis=-1)}),
        {
            "block.{i}.attn.key": ("layer_{i}.kv", "x[..., : x.shape[-1] // 2]"),
            "block.{i}.attn.value": ("layer_{i}.kv", "x[..., x.shape[-1] // 2 :]"),
        },
    ),
    "head by head": (
        blocks(lambda get: {"qkv": flat(np.stack(fused(get, "query", "key", "value"), axis=3))}),
        {
            f"block.{{i}}.attn.{name}": ("layer_{i}.qkv", f"x.reshape(*x.shape[:-1], {HEADS}, 3, -1)[..., {k}, :]")
            for k, name in enumerate(("query", "key", "value"))
        },
    ),
    "on an axis of their own": (
        blocks(lambda get: {"qkv": np.stack([x.swapaxes(1, 2) for x in fused(get, "query", "key", "value")])}),
        {
            f"block.{{i}}.attn.{name}": ("layer_{i}.qkv", f"x[{k}].swapaxes(1, 2)")
            for k, name in enumerate(("query", "key", "value"))
        },
    ),
    "stacked over the blocks": (
        lambda trace: {"norms": stacked(trace, "norm1"), "queries": stacked(trace, "attn.query").swapaxes(2, 3)},
        {"block.{i}.norm1": ("norms", ""), "block.{i}.attn.query": ("queries", "x.swapaxes(1, 2)")},
    ),
    "numbered through all blocks": (
        lambda trace: {f"norm_{2 * i + k}": trace[f"block.{i}.norm{k + 1}"] for i in range(DEPTH) for k in (0, 1)},
        {f"block.{i}.norm{k + 1}": (f"norm_{2 * i + k}", "") for i in range(DEPTH) for k in (0, 1)},
    ),
    "numbered within blocks, as many": (
        blocks(lambda get: {"mlp.0": get("mlp.fc1"), "mlp.1": get("mlp.hidden")}),
        {"block.{i}.mlp.fc1": ("layer_{i}.mlp.0", ""), "block.{i}.mlp.hidden": ("layer_{i}.mlp.1", "")},
    ),
    "in mappings of mappings, numbered with zeros": (
        lambda trace: {
            "encoder": {f"block{i:02d}": {"+sa": trace[f"block.{i}.attn.residual"]} for i in range(DEPTH)},
            "norm": trace["norm"],
        },
        {"block.{i}.attn.residual": ("encoder.block{i}.+sa", ""), "norm": ("norm", "")},
    ),
    "numbered like blocks by chance": (
        lambda trace: {"out_0": trace["block.0.norm1"], "out_1": trace["logits"]},
        {"block.0.norm1": ("out_0", "")},
    ),
    "in one block only": (
        lambda trace: {"layer_1.norm": trace["block.1.norm1"]},
        {"block.1.norm1": ("layer_1.norm", "")},
    ),
    "in blocks within a numbered encoder": (
        lambda trace: {f"encoder_0.block_{i}.norm_0": trace[f"block.{i}.norm1"] for i in range(DEPTH)},
        {"block.{i}.norm1": ("encoder_0.block_{i}.norm_0", "")},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_value_is_found_in_every_form(form: str, directory: Path) -> None:
    show, expected = FORMS[form]
    found = vit_ref.propose(showing(show), directory)
    assert {match.target: match.reading[:2] for match in found.site_matches} == expected
    assert (found.unused, found.diverges) == ((), "")
    assert_can_be_pasted(found)
    candidate = dataclasses.replace(showing(show), sites=found.sites)
    wanted = {site for target in expected for site in (target.replace("{i}", str(i)) for i in range(DEPTH))}
    assert_shown_as_the_oracle_has_them(candidate, directory, wanted)


# A linen candidate: attention is fused and returns a mapping, blocks return a tuple, and one dropout serves all.


class LinenAttention(linen.Module):
    heads: int

    @linen.compact
    def __call__(self, *, x: Array) -> dict[str, Any]:
        qkv = linen.Dense(3 * x.shape[-1], name="qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        probs = jax.nn.softmax(jnp.einsum("bqhk,bmhk->bhqm", query, key) / np.sqrt(query.shape[-1]))
        context = jnp.einsum("bhqm,bmhk->bqhk", probs, value).reshape(x.shape)
        return {"out": linen.Dense(x.shape[-1], name="proj")(context), "probs": probs, "mask": None}


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, name: str, x: Array) -> Array:
        hidden = linen.Dense(CASE.config.intermediate_size, name="up")(x)
        return linen.Dense(x.shape[-1], name="down")(jax.nn.gelu(hidden, approximate=False))


class LinenBlock(linen.Module):
    dropout: linen.Module

    @linen.compact
    def __call__(self, x: Array) -> tuple[Array]:
        normed = linen.LayerNorm(CASE.config.layer_norm_eps, name="before")(x)
        x = x + self.dropout(LinenAttention(HEADS, name="attn")(x=normed)["out"])
        normed = linen.LayerNorm(CASE.config.layer_norm_eps, name="after")(x)
        return (x + self.dropout(LinenMLP(name="mlp")("mlp", normed)),)


class LinenViT(linen.Module):
    @linen.compact
    def __call__(self, images: Array) -> Array:
        patch = CASE.config.patch_hw
        x = linen.Conv(D, patch, strides=patch, padding="VALID", name="embed")(images)
        x = x.reshape(len(x), -1, D)
        cls = self.param("cls", linen.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, D)), x], axis=1)
        dropout = linen.Dropout(0.1, deterministic=True, name="dropout")
        x = dropout(x + self.param("positions", linen.initializers.zeros, x.shape[1:]))
        for i in range(DEPTH):
            (x,) = LinenBlock(dropout, name=f"encoderblock_{i}")(x)
        x = linen.LayerNorm(CASE.config.layer_norm_eps, name="last")(x)
        return linen.Dense(CASE.config.num_labels, name="head")(x[:, 0])


def _linen(directory: Path) -> tuple[linen.Module, Any]:
    _, ours = _ported(directory)
    tree: dict[str, Any] = {"cls": ours["cls_token"], "positions": ours["position_embeddings"][0]}
    names = {"norm1": "before", "norm2": "after", "attn.out": "attn.proj", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    layers = {"patch": "embed", "norm": "last", "head": "head"}
    layers |= {f"blocks.{i}.{a}": f"encoderblock_{i}.{b}" for i in range(DEPTH) for a, b in names.items()}
    for theirs, layer in layers.items():
        *path, last = layer.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = {
            leaf: ours[f"{theirs}.{leaf}"] for leaf in ("kernel", "scale", "bias") if f"{theirs}.{leaf}" in ours
        }
    for i in range(DEPTH):
        tree[f"encoderblock_{i}"]["attn"]["qkv"] = {
            leaf: np.concatenate(
                [ours[f"blocks.{i}.attn.{name}.{leaf}"] for name in ("query", "key", "value")], axis=-1
            )
            for leaf in ("kernel", "bias")
        }
    return LinenViT(), {"params": tree}


def test_a_linen_candidate_is_seen_through_tuples_and_mappings(directory: Path) -> None:
    candidate = Candidate(load=_linen, name="linen")
    found = vit_ref.propose(candidate, directory)
    block = "encoderblock_{i}"
    assert pairs(found.sites) == {
        "patches": "embed",
        "embeddings": "encoderblock_0:input",
        "block.{i}.norm1": f"{block}.before",
        **{f"block.{{i}}.attn.{name}": f"{block}.attn.qkv" for name in ("query", "key", "value")},
        "block.{i}.attn.probs": f"{block}.attn[probs]",
        "block.{i}.attn.context": f"{block}.attn.proj:input",
        "block.{i}.attn.out": f"{block}.attn.proj",
        "block.{i}.attn.residual": f"{block}.after:input",
        "block.{i}.norm2": f"{block}.after",
        "block.{i}.mlp.fc1": f"{block}.mlp.up",
        "block.{i}.mlp.hidden": f"{block}.mlp.down:input",
        "block.{i}.mlp.out": f"{block}.mlp",
        "block.{i}.mlp.residual": f"{block}[0]",
        "norm": "last",
    }
    also = {match.target: match.also for match in found.site_matches}
    assert also["block.{i}.norm1"] == (f"{block}.attn:input", f"{block}.attn.qkv:input")
    assert also["block.{i}.norm2"] == (f"{block}.mlp.up:input", f"{block}.mlp:input[1]")
    assert not found.unshown
    assert found.repeated == ("dropout",)
    assert "# Values of the candidate met more than once, so no table can name them: dropout" in str(found)
    assert_can_be_pasted(found)
    assert_passes(candidate, found, directory, unseen=set())


def test_wrong_modules_are_recognised_by_their_parameters(directory: Path) -> None:
    def load(path: Path) -> tuple[linen.Module, Any]:
        module, variables = _linen(path)
        variables["params"]["positions"] = np.zeros_like(variables["params"]["positions"])
        return module, variables

    found = vit_ref.propose(Candidate(load=load), directory)
    right = vit_ref.propose(Candidate(load=_linen), directory)
    lost = {"block.{i}.attn.probs"}
    assert pairs(found.sites) == {site: key for site, key in pairs(right.sites).items() if site not in lost}
    assert set(found.unshown) == lost
    assert pairs(found.parameters) == pairs(right.parameters)
    assert '"positions": "position_embeddings",  # not equal (1e+00), matched by its parameters' in str(found)


# Parameters in other shapes, and parameters whose values are not distinctive.


def test_parameters_are_found_transposed_and_fused(directory: Path) -> None:
    def parameters(ours: dict[str, NDArray]) -> dict[str, NDArray]:
        theirs = {
            "conv.weight": ours["patch.kernel"].transpose(3, 2, 0, 1),
            "head.weight": ours["head.kernel"].T,
            "norms": np.stack([ours[f"blocks.{i}.norm1.scale"] for i in range(DEPTH)]),
            "extra": np.ones(5, np.float32),
        }
        for i in range(DEPTH):
            heads = [ours[f"blocks.{i}.attn.{name}.kernel"] for name in ("query", "key", "value")]
            theirs[f"h.{i}.qkv.weight"] = np.concatenate(heads, axis=-1).T
        return theirs

    found = vit_ref.propose(showing(lambda trace: {}, parameters), directory)
    third = "x[{}].swapaxes(0, 1)"
    assert {match.target: match.reading[:2] for match in found.parameter_matches} == {
        "patch.kernel": ("conv.weight", "x.swapaxes(0, 3).swapaxes(0, 2).swapaxes(1, 2)"),
        "head.kernel": ("head.weight", "x.swapaxes(0, 1)"),
        "blocks.{i}.norm1.scale": ("norms", ""),
        "blocks.{i}.attn.query.kernel": ("h.{i}.qkv.weight", third.format(": x.shape[0] // 3")),
        "blocks.{i}.attn.key.kernel": ("h.{i}.qkv.weight", third.format("x.shape[0] // 3 : 2 * x.shape[0] // 3")),
        "blocks.{i}.attn.value.kernel": ("h.{i}.qkv.weight", third.format("2 * x.shape[0] // 3 :")),
    }
    assert {"norm.scale", "blocks.{i}.norm1.bias"} <= set(found.unowned)
    assert found.unused_parameters == ("extra",)
    assert "# Parameters of the candidate without an equal in the checkpoint: extra" in str(found)
    assert_can_be_pasted(found)


@pytest.fixture(scope="module")
def untrained(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint whose biases are zeros and scales are ones, as in a fresh model."""
    source = CASE.checkpoint()
    tensors = {
        name: np.full_like(tensor, "weight" in name) if tensor.ndim == 1 else tensor
        for name, tensor in source.tensors.items()
    }
    path = tmp_path_factory.mktemp("candidates") / "untrained"
    writing.write_directory(path, tensors, source.config or {})
    return path


def test_parameters_of_zeros_and_ones_are_matched_by_layer(untrained: Path) -> None:
    found = vit_ref.propose(tutorial(), untrained)
    assert found.parameters == TUTORIAL_PARAMETERS
    fused = vit_ref.propose(Candidate(load=_linen), untrained)
    assert {
        target: select(np.arange(6)).tolist() for _, target, select in entries(fused.parameters) if "qkv.bias" in _
    } == {
        "blocks.{i}.attn.query.bias": [0, 1],
        "blocks.{i}.attn.key.bias": [2, 3],
        "blocks.{i}.attn.value.bias": [4, 5],
    }


def test_a_bias_of_zeros_is_matched_by_the_kernel_beside_it(untrained: Path) -> None:
    names = {"query": "first", "key": "second"}
    expected = {
        f"h.{{i}}.{theirs}.{leaf}": f"blocks.{{i}}.attn.{ours}.{leaf}"
        for ours, theirs in names.items()
        for leaf in ("kernel", "bias")
    }

    def parameters(ours: dict[str, NDArray]) -> dict[str, NDArray]:
        return {
            key.replace("{i}", str(i)): ours[path.replace("{i}", str(i))]
            for key, path in expected.items()
            for i in range(DEPTH)
        }

    found = vit_ref.propose(showing(lambda trace: {}, parameters), untrained)
    assert found.parameters == expected


def test_indistinguishable_parameters_are_left_to_the_user(untrained: Path) -> None:
    names = {"norm.scale": "first", "blocks.0.norm1.scale": "second"}
    model = showing(lambda trace: {}, lambda ours: {theirs: ours[path] for path, theirs in names.items()})
    found = vit_ref.propose(model, untrained)
    assert found.parameters == {}
    assert found.ambiguous["norm.scale"] == ("first", "second")
    assert "# Several parameters of the candidate equal norm.scale, choose one: first, second" in str(found)
    assert not {"norm.scale"} & set(found.unowned)


# Candidates that cannot be used.


def _raises(images: Array) -> Array:
    raise ValueError("no such layer\nsecond line")


class Compiled(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.LayerNorm(D, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))

    def __call__(self, images: Array) -> Array:
        return jax.vmap(self.norm)(images.reshape(len(images), -1)[:, :D])


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (_raises, "_raises: the forward pass raised ValueError: no such layer"),
        (lambda images: images[:, 0, :, 0], "<lambda>: no value of it can be observed: return"),
        (Candidate(load=lambda path: Compiled(), name="compiled"), "compiled: no value of it can be observed"),
        ("missing.py", "missing.py: this file does not exist"),
        (3, "it has the type int: give FILE.py or module:attr as text, a vit_ref.Candidate, or a function"),
    ],
)
def test_a_candidate_that_cannot_be_used_is_one_clear_line(candidate: Any, message: str, directory: Path) -> None:
    with pytest.raises(InputError) as caught:
        vit_ref.propose(candidate, directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_proposal_ignores_the_candidates_tables(directory: Path) -> None:
    candidate = dataclasses.replace(showing(lambda trace: {"norm": trace["norm"]}), sites={"nothing": "no.such.site"})
    assert vit_ref.propose(candidate, directory).sites == {"norm": "norm"}
