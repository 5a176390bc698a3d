"""`propose`: finds the tables of a candidate by running it beside the oracle."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vit_ref.errors import CandidateError
from vit_ref.model.sites import output_site
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.loading import find_declaration
from vit_ref.verify.compare.behaviour import require_repeatable
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.proposals.listing import Proposal
from vit_ref.verify.proposals.matching import EQUAL, Match, Search
from vit_ref.verify.proposals.readings import Place
from vit_ref.verify.proposals.recording import Recorder
from vit_ref.verify.references.numpy_oracle import NumpyOracle
from vit_ref.verify.session import load_candidate
from vit_ref.verify.vit import hf_tensors
from vit_ref.weights import mapping
from vit_ref.weights.origin import find_origin
from vit_ref.weights.pretrained import open_checkpoint

# More than one, so that a value that is the same for all images is not taken for a value of each image.
IMAGES = 2

# The layer of this package's model whose output (or input) is a site, if the layer's name differs from the site's.
_LAYERS = {
    "patches": ("patch", ""),
    "attn.context": ("attn.out", ":input"),
    "attn.residual": ("norm2", ":input"),
    "mlp.hidden": ("mlp.fc2", ":input"),
    "mlp.out": ("mlp.fc2", ""),
    "logits": ("head", ""),
}


def propose(
    candidate: Candidate | Callable[..., Any] | str,
    checkpoint: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
) -> Proposal:
    """Proposes the tables of a candidate, from one run in float64 beside the oracle.

    Args:
      candidate: see `check_port`. Tables that it has are ignored.
      checkpoint: a directory, file or hub id that the candidate's loader can load.
      images: a directory of photographs, preprocessed as the checkpoint says; None for synthetic images.

    Returns:
      The tables, with remarks on doubtful lines and on missing sites.

    Raises:
      InputError: checkpoint, candidate or images cannot be used, or no value of the candidate can be observed.
    """
    source, config = open_checkpoint(checkpoint)
    declared = dataclasses.replace(find_declaration(candidate), sites=None, parameters=None)
    with mapping.name_checkpoint_in_errors(source.path):
        loaded = load_candidate(declared, config, source)
    pixels = pixels_for(config, images, IMAGES)
    require_repeatable(loaded, pixels)
    recorder = Recorder(loaded.outline, pixels)
    loaded.tables = lambda inputs: recorder
    loaded.outputs([pixels], FLOAT64, jit=False, tap=lambda site, value: value)
    shown = {
        key: value for key, value in recorder.values.items() if re.split(r"[:\[]", key)[0] not in recorder.repeated
    }
    own = loaded.parameters()
    if not shown and not own:
        raise CandidateError(
            f"{loaded.name}: no value of it can be observed: return (logits, named intermediates), take a `tap`, or"
            " return the module itself from load()"
        )
    truth = NumpyOracle(config, hf_tensors(config, source)).trace(pixels)
    layout = mapping.detect(source.tensors)
    wanted = {name: value.astype(np.float64) for name, value in mapping.port(source.tensors, config, layout).items()}
    sites = Search(shown, truth, config)
    parameters = Search(own, wanted, config, parameters=True)
    # Equal values come first. Then sites and parameters help each other. A bias of zeros belongs to the layer whose
    # output or kernel is known. A layer whose parameters are known shows its site even after the first divergence.
    sites.run(lambda site: ())
    for guess in (False, True):
        parameters.run(lambda name: _homes(name.rpartition(".")[0], parameters) | _outputs(name, sites), guess=guess)
    sites.run(lambda site: _homes_of_site(site, parameters), guess=True)
    # The returned output is observed without a table.
    output = output_site(config)
    order = {name: k for k, name in enumerate([*truth, *wanted])}
    matched = _sorted((match for match in sites.matches.values() if match.target != output), order)
    unequal = [name for match in matched for name in _unequal(match)]
    return Proposal(
        candidate=loaded.name,
        checkpoint=find_origin(source).name,
        site_matches=matched,
        parameter_matches=_sorted(parameters.matches.values(), order),
        unshown=tuple(name for name in sites.unmatched if name != output),
        unowned=tuple(name for name in parameters.unmatched if name not in parameters.ambiguous),
        ambiguous=parameters.ambiguous,
        unused=tuple(key for key in sites.leftover if ":" not in key),
        unused_parameters=tuple(parameters.leftover),
        repeated=tuple(sorted(recorder.repeated)),
        diverges=min(unequal, key=lambda name: order[name], default=""),
    )


def _layer(site: str) -> tuple[str, str]:
    """Returns the layer whose output or input a site is, and the end of its key."""
    _, block, name = re.split(r"^(?:block\.([^.]+)\.)?", site, maxsplit=1)
    layer, end = _LAYERS.get(name, (name, ""))
    return f"blocks.{block}.{layer}" if block else layer, end


def _homes(layer: str, parameters: Search) -> set[Place]:
    """Returns the submodules of the candidate that hold parameters of a layer."""
    owners = [match for match in parameters.matches.values() if match.target.rpartition(".")[0] == layer]
    return {(match.reading.place, match.reading.part) for match in owners}


def _homes_of_site(site: str, parameters: Search) -> set[Place]:
    """Returns the keys at which a site should be, by the parameters: around a layer, or around the whole block."""
    within = [match for match in parameters.matches.values() if match.target.startswith("blocks.{i}.")]
    levels = zip(*(match.reading.place.split(".") for match in within), strict=False)
    block = ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    if site == "embeddings":
        return {(f"{block.replace('{i}', '0')}:input", None)}
    if site == "block.{i}.mlp.residual":
        return {(block, None), (f"{block}[0]", None)}
    layer, end = _layer(site)
    return {(place + end, part) for place, part in _homes(layer, parameters)}


def _outputs(parameter: str, sites: Search) -> set[Place]:
    """Returns the submodules of the candidate that show the output of a parameter's layer."""
    layer = parameter.rpartition(".")[0]
    shown = [match for match in sites.matches.values() if _layer(match.target) == (layer, "")]
    return {(key, match.reading.part) for match in shown for key in (match.reading.key, *match.also)}


def _sorted(matches: Iterable[Match], order: Mapping[str, int]) -> tuple[Match, ...]:
    return tuple(sorted(matches, key=lambda match: order[match.target.replace("{i}", "0")]))


def _unequal(match: Match) -> list[str]:
    """Returns the sites, one by one, at which a match is not equal."""
    return [match.target.replace("{i}", str(i)) for i, error in enumerate(match.errors) if error > EQUAL]
