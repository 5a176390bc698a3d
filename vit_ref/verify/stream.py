"""Verifies this package's own model block by block, in memory that does not grow with the depth.

Each block in turn becomes a model of one block, between the checkpoint's embeddings, norm and head. Forward, the
reference, the oracle and the candidate each feed it their own token stream after the block before, instead of the
embeddings. Backward, the gradient from the block after it replaces the objective. So errors add up from block to block
as in the whole model, and the code that is compiled for one block serves all.
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
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import InputError, UnjudgedError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cache.opening import opened
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.compare.backward import Comparison, gradients_report
from vit_ref.verify.compare.forward import compare_forward, never
from vit_ref.verify.compare.objectives import LOOKS, SEMANTIC_OBJECTIVES, Gradients, Objective, objectives_for
from vit_ref.verify.compare.pooling import Pooled
from vit_ref.verify.compare.trace import Progress, Trace, silent
from vit_ref.verify.judgement import OnPart, ignore_part
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import FLOAT64, Precision, resolve_precision
from vit_ref.verify.references.choice import NumpyReference, reference_for
from vit_ref.verify.results import Behaviour, CandidateReport, ParityReport
from vit_ref.verify.session import BACKWARD_OWN, FORWARD, Session
from vit_ref.verify.vit import ViTExplainer, gradient_names, hf_tensors, problem_of
from vit_ref.weights import mapping
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.pretrained import open_checkpoint
from vit_ref.weights.tensor_files import LazyTensors

# The sites at which the token stream enters a model of one block and leaves its block.
_INTO, _OUT_OF = "embeddings", "block.0.mlp.residual"
# Sites, parameters and pixels before the first block. A name that is neither here nor in a block is after the last.
_BEFORE = ("patch", "embeddings", "cls_token", "position_embeddings", "pixels")
# The number of a block in the names of any layout: "encoder.layer.3.", "layers.3.", "blocks.3.", "encoderblock_3/".
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
    cache: bool = True,
    fail_fast: bool = False,
    on_part: OnPart = ignore_part,
    progress: Progress = silent,
) -> CandidateReport:
    """Checks this package's own model, like `check_port`, with the tensors of one block in memory at a time.

    Sites, gradients, gates and errors are those of `check_port`. It differs in these points:

    - Another number of objectives may settle the gradients.
    - In the precision bfloat16 parameters are rounded when they are read. So float64, too, compares formulas with
      rounded parameters.
    - FlaxViT's own error in the precision bfloat16 differs from that in the whole model, because XLA leaves out some
      roundings of the whole model's stream.
    - The behaviour of the whole model is not checked.

    Args:
      checkpoint: safetensors: a directory, sharded or not, a file or a hub id.
      images: see `check_port`.
      revision: see `check_port`.
      ignore: see `check_port`.
      precision: see `check_port`.
      reference: "flax", or "numpy", which has no backward pass.
      backward: whether to compare gradients, too. A temporary directory keeps the streams into every block.
      cache: whether to keep compiled programs on disk for later runs; see `check_port`.
      fail_fast: whether a failed forward pass ends the run. All of it is measured then, rounding too.
      on_part: see `check_port`.
      progress: called with the name of each step before it begins.

    Returns:
      Every check with its status; `report.passed` is the verdict.

    Raises:
      InputError: see `check_port`; or the checkpoint or the reference cannot be streamed.
    """
    asked = resolve_precision(precision)
    if reference == "torch":
        raise InputError("the reference torch runs whole models only: with --stream use flax or numpy")
    source, config = open_checkpoint(checkpoint, revision=revision, ignore=ignore, lazy=True)
    if not isinstance(source.tensors, LazyTensors):
        raise InputError(
            f"{source.path}: only safetensors can be read block by block: convert the checkpoint first, with"
            " vit-ref convert SRC DST --to hf"
        )
    progress("reading every tensor once")
    with mapping.name_checkpoint_in_errors(source.path):
        for _ in mapping.port_each(source.tensors, config, mapping.detect(source.tensors)):
            pass  # this reports all tensors that are missing, unexpected, misshapen or not finite at once
    pixels = pixels_for(config, images, FORWARD)
    with opened(cache), tempfile.TemporaryDirectory() as directory:
        blocks = _Blocks(config, source, reference, asked, Path(directory))
        return _Streamed(blocks, source, pixels, asked, progress).check(
            backward=backward, fail_fast=fail_fast, on_part=on_part
        )


class _Stage(NamedTuple):
    """One block's turn. The first stage also covers all that is before the blocks, the last all that is after."""

    block: int
    depth: int

    @property
    def last(self) -> bool:
        """Whether no block follows."""
        return self.block == self.depth - 1

    def answers_for(self, name: str) -> bool:
        """Returns whether a site or gradient of the model of one block belongs to this stage.

        Args:
          name: its name in the model of one block.
        """
        if name.startswith("block"):
            return True
        return self.block == 0 if name.startswith(_BEFORE) else self.last

    def sites(self, names: Iterable[str]) -> list[str]:
        """Returns the stage's sites and those before the first block, because the incoming stream is compared, too.

        Args:
          names: sites of the model of one block.
        """
        return [name for name in names if name.startswith(_BEFORE) or self.answers_for(name)]

    def renamed(self, name: str) -> str:
        """Returns the name in the whole model.

        Args:
          name: the name in the model of one block.
        """
        return re.sub(r"^(blocks?)\.0\.", rf"\1.{self.block}.", name)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Gives an `UnjudgedError` the name of its site in the whole model."""
        try:
            yield
        except UnjudgedError as error:
            raise error.renamed(self.renamed) from None


# The implementation of one block.
One = TypeVar("One", bound=Any)


class _Chained(Generic[One]):
    """One implementation of one block, which runs as every block in turn: a `Reference` and an `Observable`.

    Args:
      one: the implementation, which holds the weights of the present block.
      directory: the directory that keeps the streams into the blocks.
    """

    claims: frozenset[str] | None = None
    fixed: frozenset[str] = frozenset()

    def __init__(self, one: One, directory: Path):
        self.name: str = one.name
        self.config: ViTConfig = one.config
        self.foreign: bool = getattr(one, "foreign", False)
        self.one = one
        self._directory = directory
        self._stage = _Stage(0, 1)
        # By dtype and brightness of the images: the streams into this block and out of it, and the gradients of the
        # stream out of it.
        self._into: dict[Any, NDArray] = {}
        self._out_of: dict[Any, NDArray] = {}
        self._cotangents: dict[Any, NDArray] = {}

    def enter(self, stage: _Stage) -> None:
        """Goes on to a block: forward with `trace` and `keep`, then back with `gradients`.

        Args:
          stage: the block's turn.
        """
        self._stage, self._into, self._out_of = stage, self._out_of, {}

    def trace(self, pixels: NDArray, precision: Precision, replace: Mapping[str, NDArray] | None = None) -> Trace:
        """Implements `Observable.trace`. Returns the stage's sites and those before the first block."""
        key = precision.dtype
        fed = {_INTO: self._into[key]} if self._stage.block else {}
        trace = {**self.one.trace(pixels, precision, {**fed, **(replace or {})}), **fed}
        if replace is None:
            self._out_of[key] = trace[_OUT_OF]
        return {site: trace[site] for site in self._stage.sites(trace)}

    def keep(self, pixels: NDArray, precision: Precision, brightness: float) -> None:
        """Keeps the stream of brighter images into this block, and computes the stream out of it.

        Args:
          pixels: float32 images (B, height, width, C).
          precision: the precision to compute in.
          brightness: the factor of the images.
        """
        key = precision.dtype, brightness
        if self._stage.block:
            np.save(self._file(*key), self._into[key].astype(np.promote_types(precision.dtype, np.float32)))
        if not self._stage.last:
            self._out_of[key] = self.one.trace(pixels * np.float32(brightness), precision, self._fed(*key))[_OUT_OF]

    def gradients(self, pixels: NDArray, precision: Precision) -> Callable[[Objective], Gradients]:
        """Implements `Reference.gradients`. Returns those of the stage."""
        stage = self._stage

        def of_this_block(objective: Objective) -> Objective:
            key = precision.dtype, objective.brightness
            pulled = {} if stage.last else {_OUT_OF: self._cotangents[key]}
            return objective._replace(fed=self._fed(*key), pulled=pulled)

        output = problem_of(self.config, pixels).output
        like = of_this_block(objectives_for(output)[0])
        differentiate = self.one.gradients(pixels, precision, like=like)

        def gradients(objective: Objective) -> Gradients:
            found = differentiate(of_this_block(objective))
            self._cotangents[precision.dtype, objective.brightness] = found.sites[_INTO]
            by_site, by_parameter = (
                {name: value for name, value in part.items() if stage.answers_for(name)}
                for part in (found.sites, found.parameters)
            )
            return Gradients(by_site, by_parameter, found.inputs)

        return gradients

    def storing(self, precision: Precision) -> _Chained[One]:
        """Implements `Reference.storing`. Returns itself, because parameters are rounded when they are read."""
        return self

    def _fed(self, dtype: np.dtype, brightness: float) -> dict[str, NDArray]:
        return {_INTO: np.load(self._file(dtype, brightness))} if self._stage.block else {}

    def _file(self, dtype: np.dtype, brightness: float) -> Path:
        return self._directory / f"{self.name}-{dtype.name}-{brightness}-{self._stage.block}.npy"


class _Blocks:
    """The reference, the oracle and the candidate, which go through the blocks together."""

    def __init__(self, config: ViTConfig, source: Checkpoint, reference: str, asked: Precision, directory: Path):
        self.source = source
        self.asked = asked
        self.whole = config
        self.config = dataclasses.replace(config, num_hidden_layers=1)
        self._prefixed = mapping.is_prefixed(source.tensors, mapping.detect(source.tensors))
        tensors = hf_tensors(self.config, self._numbered(0))
        self.reference: _Chained[Any] = _Chained(reference_for(self.config, tensors, reference), directory)
        self.oracle = _Chained(NumpyReference(self.config, tensors), directory)
        self.candidate = _Chained(OwnCandidate(self.config, self._mapped(0)), directory)

    @property
    def tensors(self) -> mapping.Tensors:
        """The block's tensors under Hugging Face's names."""
        tensors: mapping.Tensors = self.oracle.one.tensors
        return tensors

    def stages(self, indices: Iterable[int]) -> Iterator[_Stage]:
        """Yields each block's turn. During a turn only the tensors of that block are in memory.

        Args:
          indices: the blocks' numbers.
        """
        for index in indices:
            self._let_go()
            tensors = hf_tensors(self.config, self._numbered(index))
            self.reference.one.fill(tensors)
            self.oracle.one.fill(tensors)
            del tensors
            self.candidate.one.fill(self._mapped(index))
            stage = _Stage(index, self.whole.num_hidden_layers)
            for each in (self.reference, self.oracle, self.candidate):
                each.enter(stage)
            yield stage

    def _let_go(self) -> None:
        """Frees the present block's tensors."""
        held = [weakref.ref(array) for array in (*self.tensors.values(), *self.candidate.one.parameters.values())]
        self.reference.one.fill({})
        self.oracle.one.fill({})
        self.candidate.one.parameters = {}
        gc.collect(0)  # jax frees arrays that it borrowed only when Python collects garbage
        if any(array() is not None for array in held):
            gc.collect()  # A cycle, such as the frame of a caught exception, is in an older generation by now.
            gc.collect(0)  # Only now does jax free the arrays that the cycle held.

    def _numbered(self, index: int) -> Checkpoint:
        """Returns one block as the only one, by the number in its tensors' names and without the weight map."""
        tensors = {}
        for name in self.source.tensors:
            number = _NUMBER.search(name)
            if number is None or int(number[2]) == index:
                tensors[_NUMBER.sub(r"\g<1>0", name, count=1)] = self.source.tensors[name]
        return dataclasses.replace(self.source, tensors=self.asked.rounded(tensors))

    def _mapped(self, index: int) -> Checkpoint:
        """Returns one block as the only one, by the whole model's weight map, which is under test."""
        layout = mapping.detect(self.source.tensors)
        name_of = {rule.destination: rule.source for rule in layout.bind(self.whole, self._prefixed)}
        names = {
            rule.source: name_of[_Stage(index, 0).renamed(rule.destination)]
            for rule in layout.bind(self.config, self._prefixed)
        }
        tensors = {short: self.source.tensors[name] for short, name in names.items()}
        return dataclasses.replace(self.source, tensors=self.asked.rounded(tensors))


class _Streamed(Session):
    """A session that compares one block after another."""

    not_behaviour = "with --stream only single blocks run, and behaviour belongs to the whole model"

    def __init__(self, blocks: _Blocks, source: Checkpoint, pixels: NDArray, precision: Precision, progress: Progress):
        super().__init__(
            blocks.whole,
            source,
            pixels,
            blocks.candidate.one,
            precision,
            blocks.reference,
            images_backward=BACKWARD_OWN,
            progress=progress,
        )
        self._blocks = blocks
        # Parameters are rounded when they are read, so the engine must not round them again.
        self._rounded = precision._replace(stored=None)

    def forward(self, stops: Callable[[str], bool] = never) -> ParityReport:
        """Implements `Judgement.forward`. It measures rounding in every block, whatever `stops` returns."""
        blocks, problem = self._blocks, problem_of(self._blocks.config, self.pixels)
        reports: list[tuple[_Stage, ParityReport]] = []
        for stage in blocks.stages(range(blocks.whole.num_hidden_layers)):
            self.progress(f"block {stage.block} of {stage.depth}")
            part = problem.only(stage.sites(problem.shapes))
            # After the first divergence the input of a block is wrong already, so its causes mean nothing.
            diverged = any(before.semantic_failures for _, before in reports)
            with stage.naming():
                report = compare_forward(
                    self.title,
                    part,
                    blocks.reference,
                    blocks.oracle,
                    blocks.candidate,
                    self._rounded,
                    explainer=None if diverged else ViTExplainer(blocks.config, blocks.tensors, part),
                    runs_nearby=None,  # a block's input is read from a file
                )
            reports.append((stage, report))
        return _whole(reports, problem_of(blocks.whole, self.pixels).names)

    def backward(self) -> ParityReport:
        """See `Session.backward`."""
        blocks, pixels, precision = self._blocks, self.pixels[: self.images_backward], self._rounded
        if isinstance(blocks.reference.one, NumpyReference):
            blocks.reference.one.gradients(pixels, precision)  # raises an error that says why there are none
        problem = problem_of(blocks.config, pixels)
        explainer = ViTExplainer(blocks.config, {}, problem)
        objectives = objectives_for(problem.output)
        indices = range(blocks.whole.num_hidden_layers)
        found: dict[_Stage, Pooled] = {}
        for start, stop in pairwise((0, *LOOKS)):
            for stage in blocks.stages(indices):
                self.progress(f"token streams, block {stage.block} of {stage.depth}")
                for k in range(start, stop):
                    for each in (blocks.reference, blocks.candidate):
                        if each is blocks.reference or k < SEMANTIC_OBJECTIVES:
                            each.keep(pixels, FLOAT64, objectives[k].brightness)
                        each.keep(pixels, precision, objectives[k].brightness)
            for stage in blocks.stages(reversed(indices)):
                self.progress(f"gradients, block {stage.block} of {stage.depth}")
                own = [name for name in problem.gradients if stage.answers_for(name)]
                pooled = found.setdefault(stage, Pooled(own, precision.dtype, blocks.reference.foreign))
                formula = start < SEMANTIC_OBJECTIVES
                comparison = Comparison(
                    problem, blocks.reference, blocks.candidate, precision, explainer, formula=formula
                )
                with stage.naming():
                    for objective in objectives[start:stop]:
                        comparison.measure(objective, pooled)
                del comparison  # it would keep this block in memory while the next one is read
            if all(pooled.settled for pooled in found.values()):
                break
        title = f"{self.title}, backward"
        reports = [
            (stage, gradients_report(title, pooled, blocks.reference, precision, blocks.candidate.claims))
            for stage, pooled in found.items()
        ]
        return _whole(reports, gradient_names(blocks.whole))

    def behaviour(self) -> tuple[Behaviour, ...]:
        """Returns nothing, because only the whole model has a behaviour."""
        return ()


def _whole(reports: list[tuple[_Stage, ParityReport]], order: list[str]) -> ParityReport:
    """Makes one report of the whole model from those of its stages."""
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
