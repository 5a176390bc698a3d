"""`vit-ref propose`: the table of a candidate's sites."""

from __future__ import annotations

from pathlib import Path

import click

from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import json_option
from vit_ref.cli.outputs import print_result, require_outputs


@click.command()
@click.argument("candidate")
@click.argument("checkpoint")
@json_option
def propose(candidate: str, checkpoint: str, json_file: Path | None) -> None:
    """Propose the table of sites for CANDIDATE, FILE.py or module:attr, by running it beside the oracle."""
    require_outputs(json=json_file)
    with leave_when_interrupted():
        from vit_ref.verify.propose import proposal
    found = proposal.propose(candidate, checkpoint)
    print_result(str(found), json_file, found.to_json())
