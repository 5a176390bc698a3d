"""Do docstrings of functions begin with a verb in the third person, and those of classes with a noun phrase?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vit_ref

ROOT = Path(vit_ref.__file__).parent
# A word in -s before one of these is a plural noun, as in "Images of a batch".
AFTER_A_NOUN = frozenset({"and", "are", "as", "by", "in", "is", "of", "or", "that", "to", "which", "with"})
# Verbs that one of these may follow.
VERBS = frozenset({"Checks", "Records", "Returns", "Tells"})
# click prints the docstring of a command as its help, which is in the imperative. pytest names and documents its hooks.
COMMANDS = frozenset({"command", "group"})
ATTRIBUTES = frozenset({"property", "cached_property"})

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def documented() -> Iterator[tuple[str, Documented, list[str]]]:
    """Yields the place, the node and the first line's words of every public docstring."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in public(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node)
            if text:
                place = f"{file.relative_to(ROOT.parent).as_posix()}:{getattr(node, 'lineno', 1)}"
                yield place, node, text.splitlines()[0].split()


def public(node: Documented) -> Iterator[Documented]:
    """Yields a module, and the classes, functions and methods in it whose names begin with no underscore."""
    yield node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and not inner.name.startswith("_"):
            yield from public(inner) if isinstance(inner, ast.ClassDef) else iter((inner,))


def decorators(node: ast.FunctionDef) -> set[str]:
    """Returns the last part of the name of each decorator."""
    calls = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def begins_with_a_verb(words: list[str]) -> bool:
    """Tells whether the first word has the form of a verb in the third person. It is a guess from the next word."""
    first, second = words[0], (words[1:] or [""])[0]
    if not (first.replace("-", "").isalpha() and first.endswith("s") and not first.endswith("ss")):
        return False
    return first in VERBS or second not in AFTER_A_NOUN


def is_function(node: Documented) -> bool:
    """Tells whether a docstring describes an action: that of a function, which is neither attribute nor command."""
    return isinstance(node, ast.FunctionDef) and not decorators(node) & (ATTRIBUTES | COMMANDS)


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    wrong = [
        f"{place}: {' '.join(words)}"
        for place, node, words in documented()
        if is_function(node) and not begins_with_a_verb(words)
    ]
    assert not wrong, "\n".join(wrong)


def test_docstrings_of_classes_begin_with_a_noun() -> None:
    verbs = {words[0] for _, node, words in documented() if is_function(node) and begins_with_a_verb(words)}
    wrong = [
        f"{place}: {' '.join(words)}"
        for place, node, words in documented()
        if isinstance(node, ast.ClassDef) and words[0] in verbs
    ]
    assert not wrong, "\n".join(wrong)
