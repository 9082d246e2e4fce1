"""Where a dotted path is written, found in the source text: nothing is imported."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

from foveate.catalogue.record import PACKAGE


@dataclass(frozen=True)
class Place:
    """A file, relative to the repository, and a line of it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def place(path: str) -> Place | None:
    """The definition that a dotted path names; None where the text does not tell.

    >>> place("foveate.patterns.Causal").file
    'foveate/core/patterns/band.py'
    >>> place("foveate.attention").file
    'foveate/core/attention.py'
    >>> place("foveate.patterns.NoSuchThing")
    """
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        file = _file(".".join(parts[:cut]))
        if file is not None:
            return _named(file, parts[cut:], frozenset())
    return None


def _file(module: str) -> Path | None:
    base = PACKAGE.parent.joinpath(*module.split("."))
    for candidate in (base / "__init__.py", base.with_suffix(".py")):
        if candidate.is_file() and candidate.is_relative_to(PACKAGE):
            return candidate
    return None


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _named(file: Path, names: list[str], seen: frozenset[Path]) -> Place | None:
    relative = file.relative_to(PACKAGE.parent).as_posix()
    if not names:
        return Place(relative, 1)
    if file in seen:
        return None
    for statement in _statements(_tree(file).body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == names[0]:
            return Place(relative, _line(statement, names[1:]))
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
                return Place(relative, statement.lineno)
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                if alias.name == "*" or names[0] == (alias.asname or alias.name):
                    wanted = names if alias.name == "*" else [alias.name, *names[1:]]
                    found = _imported(statement.module, wanted, seen | {file})
                    if found is not None:
                        return found
    return None


def _imported(module: str, names: list[str], seen: frozenset[Path]) -> Place | None:
    inner = _file(f"{module}.{names[0]}")
    if inner is not None:
        return _named(inner, names[1:], seen)
    file = _file(module)
    return None if file is None else _named(file, names, seen)


def _statements(body: list[ast.stmt]):
    """Statements of a module, also those under `if TYPE_CHECKING` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)


def _line(statement: ast.ClassDef | ast.FunctionDef, names: list[str]) -> int:
    for inner in statement.body if names else []:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and inner.name == names[0]:
            return _line(inner, names[1:])
    return statement.lineno
