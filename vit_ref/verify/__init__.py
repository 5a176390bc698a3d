"""Verification: references, the oracle, gates and the report, behind `vit-ref verify` and `pytest -m parity`."""

from typing import TYPE_CHECKING

from vit_ref.lazy import import_on_use

if TYPE_CHECKING:
    from vit_ref.verify.candidates.declaration import Candidate
    from vit_ref.verify.proposals.listing import Proposal
    from vit_ref.verify.proposals.proposal import propose
    from vit_ref.verify.report import summary, to_html, to_json
    from vit_ref.verify.results import CandidateReport, Check
    from vit_ref.verify.session import check_port
    from vit_ref.verify.stream import check_streamed

_HOME = {
    "Candidate": "vit_ref.verify.candidates.declaration",
    "CandidateReport": "vit_ref.verify.results",
    "Check": "vit_ref.verify.results",
    "Proposal": "vit_ref.verify.proposals.listing",
    "check_port": "vit_ref.verify.session",
    "check_streamed": "vit_ref.verify.stream",
    "propose": "vit_ref.verify.proposals.proposal",
    "summary": "vit_ref.verify.report",
    "to_html": "vit_ref.verify.report",
    "to_json": "vit_ref.verify.report",
}

__all__ = [
    "Candidate",
    "CandidateReport",
    "Check",
    "Proposal",
    "check_port",
    "check_streamed",
    "propose",
    "summary",
    "to_html",
    "to_json",
]

__getattr__, __dir__ = import_on_use(__name__, _HOME)
