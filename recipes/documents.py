"""Write what the documents take from elsewhere: options and architectures in docs/, rooms and tests in CONTRIBUTING.md.

    python recipes/documents.py            # tests/test_documents.py fails while one of them is out of date

Each stands between two lines that mark its place. What a table says of an option is its help text up to the first stop,
colon, semicolon or bracket; what a list says of a room or a test file is the first paragraph of its docstring.
"""

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import rooms

from grape_hf.presets import PRESETS
from grape_hf.training_args import GrapeArgumentsMixin

ROOT = Path(__file__).resolve().parents[1]
KINDS = {int: "whole number", float: "number", bool: "`True`, `False`"}
LISTS = {"blocks": "names", "pipeline_split": "whole numbers"}  # in a string, with commas
FOUND = {"blocks": "found in the model", "pipeline_split": "even"}  # where None is given


def main() -> None:
    """Rewrite what is out of date."""
    for file, name in PARTS:
        path = ROOT / file
        path.write_text(up_to_date(path.read_text(encoding="utf-8"), name, PARTS[file, name]()), encoding="utf-8")


def up_to_date(text: str, name: str, part: str) -> str:
    """Return a document with one of its parts as it should be.

    Args:
        text: the document.
        name: of the part, in the lines that mark it.
        part: what should stand there.

    Raises:
        ValueError: if the two marks are not there, once each and in their order.
    """
    begin, end = f"<!-- {name}: begin, by recipes/documents.py -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not pattern.search(text):
        raise ValueError(f"Expected one line {begin!r} and below it one {end!r}, found them otherwise or not at all.")
    return pattern.sub(lambda _: f"{begin}\n{part}\n{end}", text)


def options_table() -> str:
    """Make the table of options, a row for each in the order of the dataclass."""
    hints = get_type_hints(GrapeArgumentsMixin)
    rows = ["| option | values | default | |", "| --- | --- | --- | --- |"]
    for option in dataclasses.fields(GrapeArgumentsMixin):
        values = LISTS.get(option.name) or _values(hints[option.name])
        cells = [f"`{option.name}`", values, _default(option), _summary(option.metadata["help"])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def architectures_table() -> str:
    """Shorten the table that ``recipes/studies/architectures.py`` wrote to the columns that a user looks for."""
    lines = (ROOT / "recipes/studies/architectures/table.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    kept = [rows[0].index(name) for name in ("model", "blocks", "JVP", "B = exact J (best matrix)", "result")]
    return "\n".join(f"| {' | '.join(row[i] for i in kept if i < len(row))} |" for row in rows)


def rooms_diagram() -> str:
    """Draw which room imports which, in Mermaid, and say of each what it is.

    An arrow that others imply is left out: the picture is of the order, tests/test_layers.py knows every import.
    """
    files = {rooms.room(name): file for name, file in rooms.modules().items() if name.count(".") < 2}
    direct = {room: rooms.imported_by(room) for room in sorted(files)}
    below = {room: _reached(room, direct) for room in direct}
    lines = ["```mermaid", "flowchart TD"]
    for room, others in direct.items():
        implied = {to for middle in others for to in below[middle] if room not in below[middle]}
        lines += [f"    {room} --> {to}" for to in sorted(others - implied)]
    return "\n".join([*lines, "```", "", *(f"- `{room}`: {_about(files[room])}" for room in direct)])


def tests_list() -> str:
    """Make the list of test files and what each is about."""
    files = sorted((ROOT / "tests").rglob("*.py"), key=lambda p: (len(p.parts), p))
    return "\n".join(f"- `{path.relative_to(ROOT / 'tests')}`: {_about(path)}" for path in files)


PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("docs/options.md", "options"): options_table,
    ("docs/architectures.md", "architectures"): architectures_table,
    ("CONTRIBUTING.md", "rooms"): rooms_diagram,
    ("CONTRIBUTING.md", "tests"): tests_list,
}


def _reached(room: str, direct: dict[str, set[str]]) -> set[str]:
    """Return the rooms that one imports, directly or through others."""
    found: set[str] = set()
    ahead = set(direct[room])
    while ahead:
        found |= ahead
        ahead = {to for middle in ahead for to in direct[middle]} - found
    return found


def _about(path: Path) -> str:
    """Return the first paragraph of a module's docstring, in one line."""
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(about.split("\n\n")[0].split())


def _values(hint: Any) -> str:
    """Write down what an option may be."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    kinds = [part for part in get_args(hint) if part is not NoneType]  # of "... or None"
    return _values(kinds[0]) if kinds else KINDS[hint]


def _default(option: Any) -> str:
    """Write down the default; of one that the preset decides, that of ``recommended``, and which presets differ."""
    if option.name not in PRESETS["recommended"]:
        return FOUND[option.name] if option.default is None else f"`{option.default}`"
    usual = PRESETS["recommended"][option.name]
    others: dict[Any, list[str]] = {}
    for preset, options in PRESETS.items():
        if options[option.name] != usual:
            others.setdefault(options[option.name], []).append(preset)
    return "; ".join([f"`{usual}`", *(f"{', '.join(presets)}: `{value}`" for value, presets in others.items())])


def _summary(help_text: str) -> str:
    return re.split(r"\. |: |; | \(|\.$", help_text, maxsplit=1)[0]


if __name__ == "__main__":
    main()
