"""The command `vit-ref propose`: finds the table of a candidate's sites."""

from __future__ import annotations

from pathlib import Path

import click

from vit_ref.cli.interrupts import leave_when_interrupted
from vit_ref.cli.options import json_option
from vit_ref.cli.outputs import print_result, require_outputs


@click.command()
@click.argument("checkpoint")
@click.option("--candidate", required=True, metavar="FILE.py|module:attr", help="Candidate to run.")
@json_option
def propose(checkpoint: str, candidate: str, json_file: Path | None) -> None:
    """Propose the table of a candidate's sites.

    The command runs the candidate on CHECKPOINT beside the oracle, and compares the values.
    """
    require_outputs(json=json_file)
    with leave_when_interrupted():
        from vit_ref.verify.proposals import proposal
    proposed = proposal.propose(candidate, checkpoint)
    print_result(str(proposed), json_file, proposed.to_json())
