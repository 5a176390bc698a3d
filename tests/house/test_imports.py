"""Do imports point only down, does each room import no more than it needs, and is `import vit_ref` light?"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vit_ref

ROOT = Path(vit_ref.__file__).parent
# Lower rooms first. A module may import from its own level and from those below. Some entries are single modules.
LEVELS = (
    ("errors",),
    ("extras", "files", "image_files"),
    ("model",),
    ("preprocessing", "weights"),
    ("finetune", "verify"),
    ("bench", "cli", "testing"),
    ("__main__",),
)
# Modules that a room may not import, even inside a function or for types alone.
FORBIDDEN = {
    "verify/compare": (
        "model",
        "weights",
        "verify.cache",
        "verify.candidates",
        "verify.cases",
        "verify.diagnose",
        "verify.proposals",
        "verify.references",
        "verify.session",
        "verify.stream",
        "verify.vit",
    ),
    # Diagnosis edits the oracle. The oracle decides, and does not depend on diagnosis.
    "verify/references": (
        "verify.cache",
        "verify.candidates",
        "verify.diagnose",
        "verify.proposals",
        "verify.session",
        "verify.stream",
    ),
    "verify/report": (
        "verify.cache",
        "verify.candidates",
        "verify.compare",
        "verify.diagnose",
        "verify.references",
        "verify.session",
        "verify.stream",
        "verify.vit",
    ),
}
# Imports that point up on purpose, for types alone: an error carries a report.
UPWARD = {("errors.py", "verify.results")}


def modules(room: str = "") -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Returns the modules of this package that a file imports, without the package's name. Submodules count too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("vit_ref.") for name in names if name.startswith("vit_ref."))


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def level(top: str) -> int:
    return next(k for k, rooms in enumerate(LEVELS) if top in rooms)


def test_every_module_has_a_level() -> None:
    tops = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert sorted(tops) == sorted(room for rooms in LEVELS for room in rooms)


def test_no_import_points_up() -> None:
    upward = []
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        if place == "__init__.py":  # it is above all rooms
            continue
        own = level(place.split("/")[0].removesuffix(".py"))
        upward += [
            (place, name)
            for name in imported(path)
            if level(name.split(".")[0]) > own and not any(place == p and within(name, n) for p, n in UPWARD)
        ]
    assert upward == []


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_no_more_than_it_needs(room: str) -> None:
    paths = modules(room)
    assert paths
    found = [
        (path.name, name)
        for path in paths
        for name in imported(path)
        if any(within(name, other) for other in FORBIDDEN[room])
    ]
    assert found == []


def test_results_are_had_without_the_engine() -> None:
    allowed = ("errors", "verify.gates", "weights.origin")
    found = list(imported(ROOT / "verify" / "results.py"))
    assert found
    assert [name for name in found if not any(within(name, other) for other in allowed)] == []


@pytest.mark.parametrize(
    ("imports", "heavy"),
    [
        ("vit_ref", ("jax", "flax", "torch", "transformers", "numpy")),
        # The engine does not import the ViT, whatever its own imports may import.
        (
            ", ".join(f"vit_ref.verify.compare.{path.stem}" for path in modules("verify/compare")).replace(
                ".__init__", ""
            ),
            ("vit_ref.model", "vit_ref.weights", "vit_ref.verify.diagnose", "flax", "torch", "transformers"),
        ),
        ("vit_ref.verify.results, vit_ref.verify.report", ("vit_ref.verify.compare", "flax", "torch", "transformers")),
    ],
    ids=["the package", "the engine", "reports"],
)
def test_an_import_stays_light(imports: str, heavy: tuple[str, ...]) -> None:
    program = f"import sys, {imports}; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "vit_ref" in loaded
    assert [name for name in loaded if any(within(name, other) for other in heavy)] == []
