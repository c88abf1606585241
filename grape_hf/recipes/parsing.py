"""Options of a recipe: a YAML or JSON file, the command line, or the file first and the command line over it."""

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe(*types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read a recipe's options into dataclasses: ``recipe.py [FILE.yaml|FILE.json] [--option value ...]``.

    What the command line says wins over the file. The keys of the file are the names of the dataclasses' fields.

    Args:
        *types: dataclasses as ``HfArgumentParser`` takes them, with no two fields of one name.
        argv: the arguments; default: those of this process.

    Returns:
        One instance of each type, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds something else than options, or an option that no type has.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read(Path(argv.pop(0)), known={action.dest for action in parser._actions}))
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        known = {option for action in parser._actions for option in action.option_strings}
        raise ValueError(
            "; ".join(_unknown(word, known) for word in unknown if word.startswith("-")) or _stray(unknown)
        )
    return tuple(parsed)


def parse_overrides(option: str, overrides: str | dict[str, Any] | None) -> dict[str, Any]:
    """Read ``name=value,name=value``, values as in YAML; a mapping from a YAML file is taken as it is.

    Args:
        option: its name, for the message.
        overrides: its value.

    Raises:
        ValueError: for words without a value.
    """
    if not isinstance(overrides, str):
        return dict(overrides or {})
    pairs = [pair.partition("=") for pair in overrides.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"{option}={overrides!r}: expected name=value,name=value.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


def read_options(path: Path) -> dict[str, Any]:
    """Return what a file of YAML or JSON holds.

    Raises:
        ValueError: if it is neither, or holds no pairs.
    """
    text = path.read_text(encoding="utf-8")
    try:
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML or JSON, and it cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected `option: value` pairs, got {type(options).__name__}.")
    return options


def _read(path: Path, known: set[str]) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: expected options or a .yaml, .yml or .json file of options first.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of options, found none there ({path.resolve()}).")
    options = read_options(path)
    unknown = [_unknown(str(name), known) for name in options if name not in known]
    if unknown:
        raise ValueError(f"{path}: {'; '.join(unknown)}")
    return options


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], known, n=1)
    return f"there is no option {name}" + (f"; is {near[0]} meant?" if near else " (see --help)")


def _stray(words: list[str]) -> str:
    return f"expected options, which begin with --, got {' '.join(words)}"
