"""What imports what in ``grape_hf``, read from its source: for the diagram in CONTRIBUTING.md and tests/test_layers.py.

A room is a package of ``grape_hf`` or one of the modules beside them. An import counts wherever it stands, inside
functions too. One under ``if TYPE_CHECKING`` is for annotations alone, and is told apart.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "grape_hf"


class Import(NamedTuple):
    """One import: the two modules by their full names, and whether it is for annotations alone."""

    importer: str
    imported: str
    typing: bool


def modules() -> dict[str, Path]:
    """Return the files of the package by the names of their modules."""
    files = sorted(PACKAGE.rglob("*.py"))
    parts = {file: file.relative_to(PACKAGE.parent).with_suffix("").parts for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}


def room(module: str) -> str:
    """Return the room of a module; the package's own ``__init__`` is the room ``grape_hf``."""
    return module.split(".")[1] if "." in module else module


def imports() -> list[Import]:
    """Return every import of a module of the package by another."""
    known = modules()
    found = []
    for importer, file in known.items():
        for node, typing in _walk(ast.parse(file.read_text(encoding="utf-8"))):
            found += [Import(importer, imported, typing) for imported in _imported(node, importer, known)]
    return list(dict.fromkeys(found))


def imported_by(importer: str) -> set[str]:
    """Return the other rooms from which a room imports anything."""
    pairs = [(room(found.importer), room(found.imported)) for found in imports()]
    return {imported for by, imported in pairs if by == importer != imported}


def _walk(node: ast.AST, typing: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, typing
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for part in child.body:
                yield part, True
            for part in child.orelse:
                yield part, typing
        else:
            yield from _walk(child, typing)


def _imported(node: ast.AST, importer: str, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"{importer}: expected imports by full names, found a relative one.")
        # `from package import name`: a module of that package, or something that its __init__ has.
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in known else str(node.module) for name in full]
    else:
        return []
    return [name for name in names if name in known]
