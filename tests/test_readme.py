"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number):
    names: dict[str, object] = {}
    exec(EXAMPLES[number], names)
    if "loss" in names:
        assert names["loss"] < 1.0  # it learns: counting upwards from a random start costs ln 256 = 5.5 at first
        assert any(not torch.equal(b, torch.eye(64)) for b in names["feedback"].B)
        assert not any(module._forward_hooks for module in names["model"].modules())


def test_there_is_a_plain_loop():
    assert any("optimizer.step()" in example for example in EXAMPLES)
