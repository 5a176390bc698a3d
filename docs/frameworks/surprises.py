"""Reads what the scripts of findings/ say of themselves: the guess, and what was seen."""

from __future__ import annotations

import re
from pathlib import Path

FINDINGS = Path(__file__).parents[2] / "findings"


def read_findings(folder: Path = FINDINGS) -> list[dict[str, str]]:
    """Returns name, guess, seen and hurts of each finding, in the order of their names.

    Raises:
        ValueError: a script lacks one of these comments.
    """
    findings = []
    for script in sorted(folder.glob("*.sh")):
        comments = [line[1:].strip() for line in script.read_text(encoding="utf-8").splitlines()[1:] if line[:1] == "#"]
        text = " ".join(comments)
        parts = re.fullmatch(r"Guess: (?P<guess>.*) Seen: (?P<seen>.*) It hurts: (?P<hurts>.*)", text)
        if parts is None:
            raise ValueError(f"{script}: the comments at the top lack Guess, Seen or It hurts: add them")
        findings.append({"name": script.stem, **parts.groupdict()})
    return findings
