"""The Python of README.md and docs/ runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    f"{page.name}-{number}": example
    for page in PAGES
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL))
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_runs(example):
    names: dict[str, object] = {}
    exec(example, names)
    assert ("loss" in names) == ("optimizer.step()" in example)
    if "loss" in names:
        assert names["loss"] < 1.0  # it learns: counting upwards from a random start costs ln 256 = 5.5 at first
        assert any(not torch.equal(b, torch.eye(64)) for b in names["feedback"].B)
        assert not any(module._forward_hooks for module in names["model"].modules())


def test_there_is_a_plain_loop():
    assert any("optimizer.step()" in example for example in EXAMPLES.values())
