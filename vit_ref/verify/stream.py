"""Verification block by block, of this package's own model, in memory that does not grow with the depth.

Each block in turn becomes a model of one block, between the checkpoint's embeddings, norm and head. Reference, oracle
and candidate each feed it the token stream that they themselves had after the block before, in place of the embeddings;
backward, the gradient that the block after it left takes the place of the objective. So errors add up from block to
block as in the whole model, and what is compiled for one block serves all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import InputError, UnjudgedError
from vit_ref.model.config import ViTConfig
from vit_ref.model.sites import sites
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.compare.backward import Comparison, gradient_names, gradients_report
from vit_ref.verify.compare.forward import ParityReport, compare, hf_tensors
from vit_ref.verify.compare.objectives import LOOKS, SEMANTIC_OBJECTIVES, Gradients, Objective, objectives_for
from vit_ref.verify.compare.pooling import Pooled
from vit_ref.verify.compare.trace import Progress, Trace, silent
from vit_ref.verify.environment import environment
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import Precision, named
from vit_ref.verify.references.choice import NumpyReference, reference_for
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.results import CandidateReport
from vit_ref.verify.session import BACKWARD_OWN, FORWARD, complete, judged
from vit_ref.weights import mapping
from vit_ref.weights.checkpoint import Checkpoint, LazyTensors
from vit_ref.weights.origin import origin
from vit_ref.weights.pretrained import opened

# The token stream into a model of one block, and out of its block.
_INTO, _OUT_OF = "embeddings", "block.0.mlp.residual"
# Sites, parameters and pixels before the first block; neither these nor a block's are after the last.
_BEFORE = ("patch", "embeddings", "cls_token", "position_embeddings", "pixels")
# A block's number in any layout's names: "encoder.layer.3.", "layers.3.", "blocks.3.", "encoderblock_3/".
_NUMBER = re.compile(r"(?<=[./])(encoderblock_)?(\d+)(?=[./])")


def check_streamed(
    checkpoint: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    ignore: Iterable[str] = (),
    precision: str | DTypeLike | Precision = "float32",
    reference: str = "flax",
    backward: bool = True,
    progress: Progress = silent,
) -> CandidateReport:
    """`check_port` of this package's own model, holding the tensors of one block at a time.

    Sites, gradients, gates and errors are those of `check_port`, though other numbers of objectives may settle the
    gradients. In the precision bfloat16 the parameters are rounded when they are read, so that float64 compares the
    formulas with rounded parameters too. FlaxViT's own error, where weights are stored and computed with in bfloat16,
    differs from that in the whole model, in which XLA leaves out roundings of its stream: by up to a third on models of
    two and three blocks. How the whole model behaves is not asked.

    Args:
      checkpoint: safetensors: a directory, sharded or not, a file or a hub id.
      images: see `check_port`.
      revision: see `check_port`.
      ignore: see `check_port`.
      precision: see `check_port`.
      reference: who judges: "flax" or "numpy", the latter forward only.
      backward: whether to judge gradients too. The streams into every block are kept in a temporary directory.
      progress: told what is being done next.

    Raises:
      InputError: see `check_port`; or the checkpoint or the reference cannot be streamed.
    """
    asked = named(precision)
    if reference == "torch":
        raise InputError("the reference torch runs whole models only: with --stream take flax or numpy")
    source, config = opened(checkpoint, revision=revision, ignore=ignore, lazy=True)
    if not isinstance(source.tensors, LazyTensors):
        raise InputError(
            f"{source.path}: only safetensors can be read block by block: convert it first, with"
            " vit-ref convert SRC DST --to hf"
        )
    read = origin(source)
    title = read.name
    progress("reading every tensor once")
    with mapping.naming(source.path):
        for _ in mapping.ported(source.tensors, config, mapping.detect(source.tensors)):
            pass  # what is missing, left over, misshapen or not finite is said here, all at once
    pixels = pixels_for(config, images, FORWARD)
    with tempfile.TemporaryDirectory() as directory:
        blocks = _Blocks(config, source, reference, asked, Path(directory))
        # Whatever rounds parameters has rounded them when they are read: the engine is to do nothing more.
        done = asked._replace(stored=None)
        forward = _forward(title, blocks, pixels, done, progress)

        def measured() -> ParityReport:
            return _backward(f"{title}, backward", blocks, pixels[:BACKWARD_OWN], done, progress)

        gradients, reason, unjudged = judged(measured if backward else None)
    report = CandidateReport(
        title=title,
        checkpoint=read,
        candidate=blocks.candidate.name,
        reference=forward.reference,
        precision=forward.precision,
        forward=forward,
        backward=gradients,
        not_backward=reason,
        behaviour=(),
        expected_failed_checks={},
        environment=environment(asked),
        not_behaviour="it is the whole model's, and blocks were judged one by one",
    )
    return complete(report, unjudged)


class _Stage(NamedTuple):
    """One block's turn. The first answers for all before it too, the last for all after it."""

    block: int
    depth: int

    @property
    def last(self) -> bool:
        """Whether no block follows."""
        return self.block == self.depth - 1

    def answers_for(self, name: str) -> bool:
        """Whether a site, or a gradient's name, of the model of one block is this stage's."""
        if name.startswith("block"):
            return True
        return self.block == 0 if name.startswith(_BEFORE) else self.last

    def sites(self, names: Iterable[str]) -> list[str]:
        """The stage's sites, and those before the first block: the stream is compared where it enters, too."""
        return [name for name in names if name.startswith(_BEFORE) or self.answers_for(name)]

    def renamed(self, name: str) -> str:
        """Such a name in the whole model."""
        return re.sub(r"^(blocks?)\.0\.", rf"\1.{self.block}.", name)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Where nobody can judge is said of the whole model."""
        try:
            yield
        except UnjudgedError as error:
            raise error.renamed(self.renamed) from None


class _Chained:
    """One implementation of one block, run as every block in turn: a `Reference`, and a `Port`.

    Args:
      one: the implementation, which holds the weights of the block whose turn it is.
      directory: where the streams into the blocks are kept.
    """

    claims: frozenset[str] | None = None
    fixed: frozenset[str] = frozenset()
    stored: DTypeLike | None = None

    def __init__(self, one: Any, directory: Path):
        self.name: str = one.name
        self.config: ViTConfig = one.config
        self.foreign: bool = getattr(one, "foreign", False)
        self.one = one
        self._directory = directory
        self._stage = _Stage(0, 1)
        # By dtype and brightness of the images: the streams into this block and out of it; and by dtype and brightness
        # the gradients with respect to the latter.
        self._into: dict[Any, NDArray] = {}
        self._out_of: dict[Any, NDArray] = {}
        self._cotangents: dict[Any, NDArray] = {}

    def enter(self, stage: _Stage) -> None:
        """Goes on to a block: with `trace` and `keep` from the first to the last, then with `gradients` back."""
        self._stage, self._into, self._out_of = stage, self._out_of, {}

    def trace(self, pixels: NDArray, dtype: DTypeLike, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """See `Port.trace`: the values at the stage's sites and at those before the first block."""
        key = np.dtype(dtype)
        fed = {_INTO: self._into[key]} if self._stage.block else {}
        trace = {**self.one.trace(pixels, dtype, {**fed, **(replace or {})}), **fed}
        if replace is None:
            self._out_of[key] = trace[_OUT_OF]
        return {site: value for site, value in trace.items() if site in self._stage.sites(trace)}

    def keep(self, pixels: NDArray, dtype: DTypeLike, brightness: float) -> None:
        """Keeps the stream of brighter images into this block, and finds the one out of it."""
        key = np.dtype(dtype), brightness
        if self._stage.block:
            np.save(self._file(*key), self._into[key].astype(np.promote_types(dtype, np.float32)))
        if not self._stage.last:
            self._out_of[key] = self.one.trace(pixels * np.float32(brightness), dtype, self._fed(*key))[_OUT_OF]

    def gradients(self, pixels: NDArray, dtype: DTypeLike) -> Callable[[Objective], Gradients]:
        """See `Differentiable.gradients`: those that are the stage's."""
        stage = self._stage

        def of_this_block(objective: Objective) -> Objective:
            key = np.dtype(dtype), objective.brightness
            pulled = {} if stage.last else {_OUT_OF: self._cotangents[key]}
            return objective._replace(fed=self._fed(*key), pulled=pulled)

        like = of_this_block(objectives_for(self.one.config, len(pixels))[0])
        differentiate = self.one.gradients(pixels, dtype, like=like)

        def gradients(objective: Objective) -> Gradients:
            found = differentiate(of_this_block(objective))
            self._cotangents[np.dtype(dtype), objective.brightness] = found.sites[_INTO]
            by_site, by_parameter = (
                {name: value for name, value in part.items() if stage.answers_for(name)}
                for part in (found.sites, found.parameters)
            )
            return Gradients(by_site, by_parameter, found.pixels)

        return gradients

    def _fed(self, dtype: np.dtype, brightness: float) -> dict[str, NDArray]:
        return {_INTO: np.load(self._file(dtype, brightness))} if self._stage.block else {}

    def _file(self, dtype: np.dtype, brightness: float) -> Path:
        return self._directory / f"{self.name}-{dtype.name}-{brightness}-{self._stage.block}.npy"


class _Blocks:
    """Reference, oracle and candidate, who take their turn at each block together."""

    def __init__(self, config: ViTConfig, source: Checkpoint, reference: str, asked: Precision, directory: Path):
        self.source = source
        self.asked = asked
        self.whole = config
        self.config = dataclasses.replace(config, num_hidden_layers=1)
        self._prefixed = mapping.is_prefixed(source.tensors, mapping.detect(source.tensors))
        tensors = hf_tensors(self.config, self._numbered(0))
        self.judge = _Chained(reference_for(self.config, tensors, reference), directory)
        self.oracle = _Chained(NumpyOracle(self.config, tensors), directory)
        self.candidate = _Chained(OwnCandidate(self.config, self._mapped(0)), directory)

    @property
    def tensors(self) -> mapping.Tensors:
        """The block's, under Hugging Face's names."""
        tensors: mapping.Tensors = self.oracle.one.tensors
        return tensors

    def stages(self, indices: Iterable[int]) -> Iterator[_Stage]:
        """Each block's turn, during which its tensors, and no other block's, are held."""
        for index in indices:
            self._let_go()
            tensors = hf_tensors(self.config, self._numbered(index))
            self.judge.one.fill(tensors)
            self.oracle.one.fill(tensors)
            del tensors
            self.candidate.one.fill(self._mapped(index))
            stage = _Stage(index, self.whole.num_hidden_layers)
            for each in (self.judge, self.oracle, self.candidate):
                each.enter(stage)
            yield stage

    def _let_go(self) -> None:
        """Nobody holds the block any more."""
        held = [weakref.ref(array) for array in (*self.tensors.values(), *self.candidate.one.parameters.values())]
        self.judge.one.fill({})
        self.oracle.one.fill({})
        self.candidate.one.parameters = {}
        gc.collect(0)  # jax forgets the arrays that it was lent only when Python collects
        if any(array() is not None for array in held):
            gc.collect()  # What refers to itself, a caught exception's frame say, has grown old meanwhile.
            gc.collect(0)  # Only now is what that had lent to jax forgotten.

    def _numbered(self, index: int) -> Checkpoint:
        """A block as the only one, found by the number in its tensors' names: the weight map has no part in it."""
        found = {}
        for name in self.source.tensors:
            number = _NUMBER.search(name)
            if number is None or int(number[2]) == index:
                found[_NUMBER.sub(r"\g<1>0", name, count=1)] = self.source.tensors[name]
        return dataclasses.replace(self.source, tensors=self.asked.rounded(found))

    def _mapped(self, index: int) -> Checkpoint:
        """A block as the only one, found by the whole model's weight map, which is under test."""
        layout = mapping.detect(self.source.tensors)
        name_of = {rule.destination: rule.source for rule in layout.bind(self.whole, self._prefixed)}
        names = {
            rule.source: name_of[_Stage(index, 0).renamed(rule.destination)]
            for rule in layout.bind(self.config, self._prefixed)
        }
        found = {short: self.source.tensors[name] for short, name in names.items()}
        return dataclasses.replace(self.source, tensors=self.asked.rounded(found))


def _forward(title: str, blocks: _Blocks, pixels: NDArray, asked: Precision, progress: Progress) -> ParityReport:
    names = [site.name for site in sites(blocks.config, 1)]
    reports: list[tuple[_Stage, ParityReport]] = []
    for stage in blocks.stages(range(blocks.whole.num_hidden_layers)):
        progress(f"block {stage.block} of {stage.depth}")
        with stage.naming():
            report = compare(
                title,
                blocks.config,
                blocks.tensors,
                pixels,
                stage.sites(names),
                blocks.judge,
                blocks.oracle,
                blocks.candidate,
                asked,
                # After the first divergence a block is fed what diverges already.
                explain=not any(before.semantic_failures for _, before in reports),
            )
        reports.append((stage, report))
    return _whole(reports, [site.name for site in sites(blocks.whole, 1)])


def _backward(title: str, blocks: _Blocks, pixels: NDArray, asked: Precision, progress: Progress) -> ParityReport:
    if isinstance(blocks.judge.one, NumpyReference):
        blocks.judge.one.gradients(pixels, asked.dtype)  # says why there are none
    objectives = objectives_for(blocks.config, len(pixels))
    names = gradient_names(blocks.config)
    indices = range(blocks.whole.num_hidden_layers)
    found: dict[_Stage, Pooled] = {}
    for start, stop in pairwise((0, *LOOKS)):
        for stage in blocks.stages(indices):
            progress(f"token streams, block {stage.block} of {stage.depth}")
            for k in range(start, stop):
                for each in (blocks.judge, blocks.candidate):
                    if each is blocks.judge or k < SEMANTIC_OBJECTIVES:
                        each.keep(pixels, np.float64, objectives[k].brightness)
                    with asked.asked():
                        each.keep(pixels, asked.dtype, objectives[k].brightness)
        for stage in blocks.stages(reversed(indices)):
            progress(f"gradients, block {stage.block} of {stage.depth}")
            own = [name for name in names if stage.answers_for(name)]
            pooled = found.setdefault(stage, Pooled(own, asked.dtype, blocks.judge.foreign))
            formula = start < SEMANTIC_OBJECTIVES
            comparison = Comparison(pixels, blocks.judge, blocks.candidate, asked, formula=formula)
            with stage.naming():
                for objective in objectives[start:stop]:
                    comparison.measure(objective, pooled)
            del comparison  # which holds this block while the next one is read
        if all(pooled.settled for pooled in found.values()):
            break
    reports = [
        (stage, gradients_report(title, pooled, blocks.judge, asked, blocks.candidate.claims))
        for stage, pooled in found.items()
    ]
    return _whole(reports, gradient_names(blocks.whole))


def _whole(reports: list[tuple[_Stage, ParityReport]], order: list[str]) -> ParityReport:
    """The report of the whole model, of its stages'."""
    found = {
        stage.renamed(result.site): result._replace(site=stage.renamed(result.site))
        for stage, report in reports
        for result in report.results
        if stage.answers_for(result.site)
    }
    results = tuple(found[name] for name in order if name in found)
    unobserved = tuple(name for name in order if name not in found)
    whole = dataclasses.replace(
        reports[0][1], results=results, unobserved=unobserved, causes=(), place="", order=tuple(order)
    )
    failures = whole.semantic_failures or whole.numerical_failures
    for stage, report in reports:
        own = report.semantic_failures or report.numerical_failures
        if failures and own and stage.renamed(own[0].site) == failures[0].site:
            causes = tuple(cause._replace(site=stage.renamed(cause.site)) for cause in report.causes)
            return dataclasses.replace(whole, causes=causes, place=report.place)
    return whole
