"""Options from files and the command line: which wins, and what is refused."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from grape_hf.recipes.parsing import parse_recipe


@dataclass
class Options:
    name: str = "default"
    rate: float = 0.1
    steps: int = 5
    flag: bool = True
    mapping: str | None = field(default=None, metadata={"help": "text or a mapping"})


@dataclass
class More:
    extra: int = 0


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file(tmp_path: Path):
    file = write(tmp_path / "a.yaml", "name: file\nrate: 1e-3\nextra: 7\nflag: false\nmapping: {a: 1}\n")
    options, more = parse_recipe(Options, More, argv=[file, "--name", "typed", "--steps", "9"])
    assert options == Options("typed", 1e-3, 9, False, {"a": 1})  # YAML reads 1e-3 as a string
    assert more.extra == 7


def test_json_and_no_file_at_all(tmp_path: Path):
    file = write(tmp_path / "a.json", json.dumps({"rate": 2.5}))
    assert parse_recipe(Options, argv=[file])[0].rate == 2.5
    assert parse_recipe(Options, argv=["--no_flag"])[0] == Options(flag=False)
    assert parse_recipe(Options, argv=[])[0] == Options()


def test_the_arguments_of_the_process_are_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--steps", "3"])
    assert parse_recipe(Options)[0].steps == 3


@pytest.mark.parametrize(
    ("name", "text", "error", "match"),
    [
        ("a.yaml", "naem: x", ValueError, r"a.yaml: there is no option naem; is name meant\?"),
        ("a.yaml", "- name", ValueError, "expected `option: value` pairs, got list"),
        ("a.txt", "name: x", ValueError, "expected options or a .yaml"),
        ("a.yaml", None, FileNotFoundError, "expected a file of options, found none"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str | None, error: type[Exception], match: str):
    file = write(tmp_path / name, text) if text else str(tmp_path / name)
    with pytest.raises(error, match=match):
        parse_recipe(Options, argv=[file])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"no option --stesp; is --steps meant\?"):
        parse_recipe(Options, argv=["--stesp", "3"])
    with pytest.raises(ValueError, match="which begin with --, got astray"):
        parse_recipe(Options, argv=["--steps", "3", "astray"])
