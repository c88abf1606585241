"""The study of transformers' example scripts: where its line goes, and what it takes for the same run.

The scripts are not in this project, so the study itself is not run here.
"""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from example_scripts import EXAMPLES, LINE, LINE_WITH_OPTIONS, Outcome, differences, failures, logged, patch, report
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

import grape_hf

SCRIPT = '''"""A script in the form of transformers' own."""
import sys

from transformers import (
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed
import json


def main():
    from transformers import Trainer as Stock

    return Trainer, TrainingArguments, Stock
'''


@pytest.mark.parametrize("line", [LINE, LINE_WITH_OPTIONS])
def test_the_line_comes_after_the_last_import_at_the_top(line):
    lines = patch(SCRIPT, line).splitlines()
    assert [number for number, text in enumerate(lines) if text == line] == [8]
    assert lines[:8] + lines[9:] == SCRIPT.splitlines()
    ast.parse("\n".join(lines))


def test_what_the_patched_script_takes_for_the_trainer_is_ours():
    names: dict = {}
    exec(patch(SCRIPT, LINE_WITH_OPTIONS), names)
    trainer, arguments, stock = names["main"]()
    assert (trainer, arguments) == (grape_hf.GrapeTrainer, grape_hf.GrapeTrainingArguments)
    assert issubclass(trainer, stock)
    exec(patch(SCRIPT, LINE), names)
    assert names["main"]()[1] is arguments.__mro__[2]  # the stock arguments: the defaults of GrAPE hold


def test_the_longer_line_brings_the_options_to_the_command_line():
    parser = HfArgumentParser(grape_hf.GrapeTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--method", "dfa", "--jvp_steps", "2"])
    assert (args.method, args.jvp_steps) == ("dfa", 2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    save_file({"B_1": torch.ones(2)}, folder / "checkpoint-4" / "grape_feedback.safetensors")
    history = [{"step": 4, "loss": 1.0, "grape/alignment/estimate/mean": 0.5}, {"step": 4, "eval_loss": 2.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


@pytest.mark.parametrize(
    "change", ["model.safetensors", "checkpoint-4/grape_feedback.safetensors", "loss", "eval_loss"]
)
def test_a_difference_in_anything_is_found(run: Path, change: str):
    other = run.with_name("other")
    shutil.copytree(run, other)
    assert differences(run, other, 4) == []
    if change.endswith("safetensors"):
        save_file({k: torch.nextafter(t, t + 1) for k, t in load_file(other / change).items()}, other / change)
    else:
        state = json.loads((other / "trainer_state.json").read_text())
        changed = [
            entry | ({change: entry[change] + 1e-9} if change in entry else {}) for entry in state["log_history"]
        ]
        (other / "trainer_state.json").write_text(json.dumps({"log_history": changed}))
    (found,) = differences(run, other, 4)
    assert change in found


@pytest.mark.parametrize(("values", "holds"), [([0.5, -1.0], True), ([], False), ([0.5, float("nan")], False)])
def test_what_counts_as_logged(values, holds):
    assert logged([{"loss": 1.0}, *({"grape/alignment/x": value} for value in values)], "grape/alignment/x") is holds


def test_a_check_that_fails_shows_in_the_table():
    figures = {"train_loss": 1.0, "eval_loss": 2.0, **dict.fromkeys(EXAMPLES["run_glue"].metrics, 0.5)}
    text = report([Outcome("run_glue", figures, figures, (False, True), {"card": True, "options": False})], 20, 60.0)
    assert "| run_glue | no | yes | yes | no |" in text
    assert "| run_glue | eval_loss | 2 | 2 |" in text


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("card", [True, False])
def test_what_fails(ours, stock, card):
    outcome = Outcome("run_glue", {}, {}, (ours, stock), {"card": card})
    expected = [] if card else ["run_glue: card"]
    assert failures([outcome]) == expected + (["run_glue: resumes"] if stock and not ours else [])
