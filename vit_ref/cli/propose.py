"""The command `vit-ref propose`: finds the table of a candidate's sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vit_ref.cli.embedded import open_checkpoint
from vit_ref.cli.inputs import Shapes, input_options, make_inputs, require_one_source
from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import cache_option, json_option
from vit_ref.cli.outputs import print_result, require_outputs
from vit_ref.errors import InputError
from vit_ref.verify.candidates.spec import split_spec


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--reference", metavar="FILE.py|module:attr", help="Reference of another model than a ViT; see compare.")
@click.option("--candidate", required=True, metavar="FILE.py|module:attr", help="Candidate to run.")
@input_options
@json_option
@cache_option
def propose(
    checkpoint: str | None,
    reference: str | None,
    candidate: str,
    inputs: Path | None,
    shapes: Shapes,
    seed: int,
    json_file: Path | None,
    cache: bool,
) -> None:
    """Propose the table of a candidate's sites.

    The command runs the candidate on CHECKPOINT beside the oracle, or beside --reference, and compares the values.
    Without CHECKPOINT and --reference it uses a small embedded case. --inputs, --shape and --seed need --reference.
    """
    if reference is None and (inputs or shapes or seed):
        raise InputError("--inputs, --shape and --seed need --reference: give it, or leave them out")
    require_one_source(inputs, shapes)
    require_outputs(json=json_file)
    for side in filter(None, (reference, candidate)):
        split_spec(side)
    with leave_when_interrupted():
        from vit_ref.verify.cache.opening import opened
        from vit_ref.verify.pairs import proposal as pairs
        from vit_ref.verify.proposals import proposal
    with opened(cache):
        if reference is not None:
            given = make_inputs(inputs, shapes, seed)
            proposed: Any = pairs.propose(reference, candidate, checkpoint, inputs=given, seed=seed)
        else:
            with open_checkpoint(checkpoint) as place:
                proposed = proposal.propose(candidate, place)
    print_result(str(proposed), json_file, proposed.to_json())
