"""For any configuration, is every fault of a checkpoint reported by name, and every wrong rule detected?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.helpers.vit_strategies import configs, indices, random_bits, seeds, square_configs, times, with_room, within
from vit_ref.errors import MappingError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.cases import CASES, Case
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.gates import error
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.weights import layouts, mapping
from vit_ref.weights.layouts import LAYOUTS, Layout, Rule, Transform
from vit_ref.weights.mapping import Tensors

Traced = Callable[..., Trace]

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
# Each picks a tensor by its index.
faults = st.lists(
    st.tuples(indices, st.sampled_from(("dropped", "added", "renamed", "duplicated", "reshaped"))),
    min_size=1,
    max_size=4,
)
# The number of a block in a tensor's name, in any layout.
BLOCK = re.compile(r"(layers?[./]|blocks\.|encoderblock_)(\d+)")


def twin(name: str, layout: Layout, config: ViTConfig) -> str:
    """Returns the tensor's name in the block after the last, or outside the blocks with a prefix."""
    beyond = BLOCK.sub(rf"\g<1>{config.num_hidden_layers}", name)
    if beyond != name:
        return beyond
    bare = name.removeprefix(layout.prefix or "Transformer/")
    return bare if bare != name else (layout.prefix or "Transformer/") + name


def misshapen(tensor: NDArray, choice: int) -> NDArray:
    """Returns the tensor in one of the wrong shapes that a mistake gives it."""
    shapes = (tensor[None], tensor.reshape(-1), tensor.squeeze(), tensor.T, tensor[:-1], tensor.repeat(2, axis=-1))
    others = [other for other in shapes if other.shape != tensor.shape]
    return others[choice % len(others)]


@each_layout
@times(4)
@given(config=configs(), seed=seeds, faults=faults)
def test_all_faults_are_reported_and_nothing_else(
    layout: Layout, config: ViTConfig, seed: int, faults: list[tuple[int, str]]
) -> None:
    config = within(layout, config)
    source = mapping.export(with_room(layout, random_bits(config, np.float32, seed)), config, layout)
    names, broken, expected = sorted(source), dict(source), set()
    for choice, fault in {index % len(names): (index, fault) for index, fault in faults}.values():
        name = names[choice % len(names)]
        other = twin(name, layout, config) if fault in ("renamed", "duplicated") else f"{name}_{choice}"
        if fault in ("dropped", "renamed"):
            del broken[name]
            expected.add(("missing", name, source[name].shape))
        if fault in ("added", "renamed", "duplicated"):
            broken[other] = source[name]
            expected.add(("unexpected", other, source[name].shape))
        if fault == "reshaped":
            broken[name] = misshapen(source[name], choice)
            expected.add(("misshapen", name, broken[name].shape))
    with pytest.raises(MappingError) as caught:
        mapping.port(broken, config, mapping.detect(broken))
    found = caught.value.faults
    assert {(fault.kind, fault.name) for fault in found} == {(kind, name) for kind, name, _ in expected}
    assert len(found) == len(expected)
    lines = str(caught.value).splitlines()[1:]
    for kind, name, shape in expected:
        assert [line for line in lines if line.startswith(f"  {kind}: {name}: ") and str(shape) in line]


def test_after_a_fault_no_tensor_is_returned_but_all_are_checked() -> None:
    config = CASES["rectangular"].config
    source = dict(CASES["rectangular"].checkpoint().tensors)
    last, late = "vit.embeddings.cls_token", "vit.layernorm.weight"
    source[last] = np.full_like(source[last], np.nan)
    del source[late]
    handed: list[str] = []
    with pytest.raises(MappingError) as caught:
        handed.extend(path for path, _ in mapping.port_each(source, config, layouts.HF))
    assert {(fault.kind, fault.name) for fault in caught.value.faults} == {("not finite", last), ("missing", late)}
    assert handed == []


@each_layout
@given(config=configs(max_blocks=12), prefixed=st.booleans())
def test_no_two_rules_can_match_one_name(layout: Layout, config: ViTConfig, prefixed: bool) -> None:
    config = within(layout, config)
    # With the prefix and without, whichever the checkpoint has.
    prefix = f"(?:{re.escape(layout.prefix)})?"
    sources = {rule.source for rule in layout.rules}
    patterns = [re.compile(prefix + re.escape(source).replace(r"\{i\}", r"\d+")) for source in sources]
    bound = layout.bind(config, prefixed)
    names = [rule.source for rule in bound]
    assert len({(rule.source, rule.part) for rule in bound}) == len(bound) == len(list_parameters(config))
    assert {name: sum(bool(pattern.fullmatch(name)) for pattern in patterns) for name in names} == dict.fromkeys(
        names, 1
    )


@each_layout
@given(config=configs(), depth=st.integers(11, 14), seed=seeds)
def test_blocks_are_in_numeric_order_for_any_order_of_tensors(
    layout: Layout, config: ViTConfig, depth: int, seed: int
) -> None:
    config = dataclasses.replace(within(layout, config), num_hidden_layers=depth)
    source = mapping.export(with_room(layout, random_bits(config, np.float32)), config, layout)
    # Every tensor of a block is filled with the number in its name. Files list 10 before 2, or have no order.
    names = np.random.default_rng(seed).permutation(sorted(source))
    numbered = {
        str(name): np.full_like(source[name], int(match[2]) if (match := BLOCK.search(name)) else -1) for name in names
    }
    ported = mapping.port(numbered, config, layout)
    blocks = {path: int(path.split(".")[1]) for path in ported if path.startswith("blocks.")}
    assert {path: set(ported[path].flat) for path in blocks} == {path: {block} for path, block in blocks.items()}
    assert list(dict.fromkeys(blocks.values())) == list(range(depth))


# The site at which the effect of a parameter is seen first.
_SITES = {"patch": "patches", "cls_token": "embeddings", "position_embeddings": "embeddings", "head": "logits"}


def site_of(path: str) -> str:
    """Returns the first site that the parameters of a destination write, in the first block if they are a block's."""
    layer = path.removesuffix(".kernel").removesuffix(".bias").removesuffix(".scale")
    layer = layer.replace("blocks.{i}.", "block.0.").replace("mlp.fc2", "mlp.out")
    return _SITES.get(layer, layer)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A checkpoint in one layout, and the NumPy oracle as its truth, which does not use the weight map.

    The oracle detects any permutation of elements. A mean, a shape or a sorted list of values does not.
    """

    config: ViTConfig
    source: Tensors
    images: NDArray
    truth: Trace
    traced: Traced

    def first_divergence(self, layout: Layout, source: Tensors | None = None) -> str | None:
        """Returns the first site beyond the semantic gate if `layout` maps the checkpoint, or another `source`."""
        parameters = mapping.port(self.source if source is None else source, self.config, layout)
        trace = self.traced(self.config, parameters, self.images)
        wrong = (site for site, value in trace.items() if not error(value, self.truth[site]).passes_semantic_gate)
        return next(wrong, None)


@pytest.fixture(scope="session")
def probe(traced: Traced) -> Callable[[ViTConfig, Layout, int], Probe]:
    def make(config: ViTConfig, layout: Layout, seed: int) -> Probe:
        case = Case("random", config, batch=2, seed=seed)
        parameters = with_room(layout, mapping.port(case.checkpoint().tensors, config, layouts.HF))
        tensors, images = mapping.export(parameters, config, layouts.HF), case.images()
        source = mapping.export(parameters, config, layout)
        return Probe(config, source, images, NumpyOracle(config, tensors).trace(images), traced)

    return make


def with_rules(layout: Layout, changed: Iterable[Rule]) -> Layout:
    """Returns the layout with other rules for the same sources, or for parts of them."""
    replaced = {(rule.source, rule.part): rule for rule in changed}
    rules = tuple(replaced.get((rule.source, rule.part), rule) for rule in layout.rules)
    return dataclasses.replace(layout, rules=rules)


def transposed(rule: Rule) -> Rule:
    """Returns the rule with two square axes exchanged: the last two of a kernel, or the first two of a patch kernel."""
    axes = (0, 1) if rule.destination == "patch.kernel" else (-1, -2)
    right = rule.transform
    wrong = Transform(
        lambda x, c: right.to_parameter(x, c).swapaxes(*axes), lambda x, c: right.to_source(x.swapaxes(*axes), c)
    )
    return rule._replace(transform=wrong)


def shapes_by_template(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    return {re.sub(r"^blocks\.\d+", "blocks.{i}", path): s for path, s in list_parameters(config).items()}


@each_layout
@given(config=square_configs(), seed=seeds)
def test_a_transposed_square_kernel_is_seen_at_its_own_site(
    probe: Callable[..., Probe], layout: Layout, config: ViTConfig, seed: int
) -> None:
    config = within(layout, config)
    checkpoint = probe(config, layout, seed)
    assert checkpoint.first_divergence(layout) is None
    kernels = [
        rule for rule in layout.rules if rule.destination in shapes_by_template(config) and "kernel" in rule.destination
    ]
    seen = {rule.destination: checkpoint.first_divergence(with_rules(layout, [transposed(rule)])) for rule in kernels}
    assert seen == {rule.destination: site_of(rule.destination) for rule in kernels}


@each_layout
@given(config=square_configs(), seed=seeds, pair=indices)
def test_two_exchanged_layers_are_seen_at_the_earlier_one(
    probe: Callable[..., Probe], layout: Layout, config: ViTConfig, seed: int, pair: int
) -> None:
    config = within(layout, config)
    shapes = shapes_by_template(config)
    rules = [rule for rule in layout.rules if rule.destination in shapes]
    pairs = [
        (one, other)
        for k, one in enumerate(rules)
        for other in rules[k + 1 :]
        if shapes[one.destination] == shapes[other.destination] and ("{i}" in one.source) == ("{i}" in other.source)
    ]
    one, other = pairs[pair % len(pairs)]
    wrong = with_rules(
        layout, [one._replace(destination=other.destination), other._replace(destination=one.destination)]
    )
    order = [site.name for site in sites(config, batch=2)]
    earlier = min(site_of(one.destination), site_of(other.destination), key=order.index)
    assert probe(config, layout, seed).first_divergence(wrong) == earlier


@each_layout
@given(config=square_configs(), seed=seeds, block=indices, step=indices)
def test_two_exchanged_blocks_are_seen_at_the_earlier_one(
    probe: Callable[..., Probe], layout: Layout, config: ViTConfig, seed: int, block: int, step: int
) -> None:
    config = within(layout, config)
    depth = config.num_hidden_layers
    first = block % (depth - 1)
    second = first + 1 + step % (depth - 1 - first)
    places = {str(first): str(second), str(second): str(first)}
    checkpoint = probe(config, layout, seed)
    exchanged = {
        BLOCK.sub(lambda match: match[1] + places.get(match[2], match[2]), name): tensor
        for name, tensor in checkpoint.source.items()
    }
    assert checkpoint.first_divergence(layout, exchanged) == f"block.{first}.norm1"
