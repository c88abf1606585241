"""Documents: what they take from the code is up to date, messages they quote are the code's, links lead somewhere."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import documents
import pytest
import yaml

import grape_hf
from grape_hf import GrapeTrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def texts(tree: ast.AST) -> Iterator[str]:
    """All strings of a module, with NUL in place of what an f-string fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def links(document: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(read(document)))


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("document", "part"), documents.PARTS)
def test_what_comes_from_the_code_is_up_to_date(document, part):
    text = read(document)
    made = documents.up_to_date(text, part, documents.PARTS[document, part]())
    assert made == text, f"{document} is out of date: python recipes/documents.py"


def test_the_table_has_every_option_with_its_choices_and_defaults():
    rows = {row.split("`")[1]: row for row in documents.options_table().splitlines()[2:]}
    assert list(rows) == [f.name for f in dataclasses.fields(grape_hf.GrapeArgumentsMixin)]
    assert "| `lms`, `cosine`, `ema`, `local` | `local`; paper: `cosine` |" in rows["feedback_rule"]
    assert "| whole number | `0`; convnet: `3` | How many feedback points there are" in rows["feedback_points"]
    assert rows["jvp_steps"].endswith("| whole number | `1` | B_l learns every so many optimiser steps |")
    assert "| names | found in the model |" in rows["blocks"]
    assert max(map(len, rows.values())) < 200


@pytest.mark.parametrize("marks", ["", "<!-- a: end -->\n<!-- a: begin, by recipes/documents.py -->\n"])
def test_a_document_without_its_marks_is_refused(marks):
    with pytest.raises(ValueError, match="begin, by recipes/documents.py"):
        documents.up_to_date(f"before\n{marks}after", "a", "text")


def test_a_part_takes_the_place_of_the_old_one_and_leaves_the_rest():
    begin, end = "<!-- a: begin, by recipes/documents.py -->", "<!-- a: end -->"
    made = documents.up_to_date(f"before\n{begin}\nold\n{end}\nafter\n", "a", r"new \1")
    assert made == f"before\n{begin}\nnew \\1\n{end}\nafter\n"


def test_messages_quoted_are_the_packages_own():
    said = [text for path in (ROOT / "grape_hf").rglob("*.py") for text in texts(ast.parse(path.read_text()))]
    blocks = re.findall(r"```text\n(.*?)```", read("docs/troubleshooting.md"), flags=re.DOTALL)
    quoted = [line for block in blocks for line in block.splitlines()]
    assert len(quoted) > 25
    patterns = {line: ".*".join(map(re.escape, line.split("..."))) for line in quoted}
    assert [line for line, pattern in patterns.items() if not any(re.search(pattern, s, re.DOTALL) for s in said)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    found = links(document)
    assert found
    for link in (link for link in found if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = ROOT / document if not path else (ROOT / document).parent / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_found_from_where_a_reader_begins(page):
    name = Path(page).name
    begun = {f"README.md: {link}" for link in links("README.md")}
    begun |= {f"docs/how_it_works.md: {link}" for link in links("docs/how_it_works.md")}
    assert begun & {f"README.md: docs/{name}", f"docs/how_it_works.md: {name}"}


def test_the_readme_is_short_enough_to_be_read_to_its_end():
    assert len(read("README.md").split()) <= 1300  # as `wc -w` counts: tables and code are in it


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_that_are_spelt_out_exist(document):
    options = {f.name for f in dataclasses.fields(GrapeTrainingArguments)}
    named = set(re.findall(r"`(\w+)=[^`]*`", without_code(read(document)))) - {"resume_from_checkpoint"}
    # Of other things: an environment variable, one of gradient_checkpointing_kwargs, one of a model's configuration.
    assert named - options <= {"CUDA_VISIBLE_DEVICES", "use_reentrant", "loss_type"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == grape_hf.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert re.search(rf"^## {re.escape(grape_hf.__version__)}\b", read("CHANGELOG.md"), flags=re.MULTILINE)
