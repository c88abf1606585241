"""What is shown of a run while it goes on: the bar, the table of notebooks, TensorBoard; quiet where that is asked for.

The table is checked with IPython where that is installed.
"""

import json
import re
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, OnEvent, logged, make_trainer, train
from problems import GPT2, Problem
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from grape_hf.reports.log_names import PRESET, log_names
from grape_hf.reports.progress import ProgressFigures

CALIBRATED = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 4}
SMALL = {"max_steps": 8, "logging_steps": 2}


class Convolutions(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh()) for _ in range(2))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.fc(x.flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def picture(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.rand(1, 4, 4, generator=generator), "labels": torch.randint(3, (), generator=generator)}


CONVNET = Problem("convnet", Convolutions, picture)


def test_the_bar_shows_loss_alignment_and_share_of_backpropagation(tmp_path, capfd):
    trainer = make_trainer(GPT2, tmp_path, disable_tqdm=False, **SMALL, **CALIBRATED)
    trainer.train()
    seen = re.findall(r"loss ([\d.]+), alignment (-?[\d.]+), BP share ([\d.]+) %", capfd.readouterr().err)
    for name, column in (("loss", 0), ("grape/alignment/estimate/mean", 1), ("grape/calibration/share", 2)):
        values = [value for _, value in logged(trainer, name)]
        assert len(values) == 4
        shown = [float(row[column]) * (0.01 if column == 2 else 1) for row in seen]
        for value in values:
            assert any(abs(value - s) <= 6e-4 * max(1, value) for s in shown), (name, value, shown)


def test_without_bar_nothing_is_shown(tmp_path, capfd):
    make_trainer(GPT2, tmp_path, disable_tqdm=True, **SMALL, **CALIBRATED).train()  # without the stock printer
    assert capfd.readouterr() == ("", "")


def test_the_stock_trainer_and_a_removed_bar_stay_as_they_are(tmp_path, capfd):
    bp = make_trainer(GPT2, tmp_path, method="bp")
    assert not any(isinstance(c, ProgressFigures) for c in bp.callback_handler.callbacks)
    trainer = make_trainer(GPT2, tmp_path, disable_tqdm=False, **SMALL, **CALIBRATED)
    trainer.remove_callback(ProgressCallback)
    capfd.readouterr()
    trainer.train()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_notebook_table_shows_alignment_and_share_of_backpropagation(tmp_path, evaluated):
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    more: dict[str, Any] = {"eval_dataset": GPT2.samples(4)} if evaluated else {}
    steps: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4} if evaluated else {}
    trainer = make_trainer(GPT2, tmp_path, more=more, disable_tqdm=False, **SMALL, **steps, **CALIBRATED)
    trainer.remove_callback(ProgressCallback)
    figures = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressFigures))
    trainer.remove_callback(figures)
    table = NotebookProgressCallback()
    trainer.add_callback(table)
    trainer.add_callback(figures)  # as in a notebook, where the Trainer itself takes this callback
    tables: list[Any] = []
    trainer.add_callback(
        OnEvent("step_end", lambda *_, **__: tables.append(deepcopy(table.training_tracker.inner_table)))
    )
    trainer.train()
    header, *rows = tables[-1]
    assert header == ["Step", "Training Loss", *(["Validation Loss"] if evaluated else []), "Alignment", "BP share"]
    alignment = dict(logged(trainer, "grape/alignment/estimate/mean"))
    share = dict(logged(trainer, "grape/calibration/share"))
    assert [row[0] for row in rows] == ([4] if evaluated else [2, 4, 6])
    for row in rows:
        assert row[-2:] == [f"{alignment[row[0]]:.3f}", f"{100 * share[row[0]]:.3g} %"]


def test_tensorboard_has_every_figure_under_one_prefix(tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = CALIBRATED | {"fallback": "block"}
    trainer = make_trainer(GPT2, tmp_path, report_to="tensorboard", **SMALL, **options)
    trainer.train()
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    stock = make_trainer(GPT2, tmp_path, Trainer, **SMALL)
    stock.train()
    usual = {f"train/{name}" for entry in stock.state.log_history for name in entry} - {"train/step"}
    ours = set(events.Tags()["scalars"]) - usual
    assert all(tag.startswith("train/grape/") for tag in ours)
    groups = {tag.split("/")[2] for tag in ours}
    assert groups == {"alignment", "calibration", "feedback", "fallback"}
    for tag in ours:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = logged(trainer, tag.removeprefix("train/"))
        assert expected
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_what_a_run_measures_of_itself_is_logged_under_one_prefix():
    assert log_names({"alignment/exact/mean": 0.5}) == {"grape/alignment/exact/mean": 0.5}


@pytest.mark.parametrize(("problem", "preset"), [(GPT2, "recommended"), (CONVNET, "convnet")], ids=["gpt2", "convnet"])
def test_the_settings_that_auto_has_chosen_are_said_above_the_bar_and_noted(problem, preset, tmp_path, capfd):
    options: dict[str, Any] = {"max_steps": 2, "grape_preset": "auto"}
    trainer = make_trainer(problem, tmp_path, disable_tqdm=False, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    line = f'GrAPE: grape_preset="{preset}", as there are '
    seen = capfd.readouterr()
    assert (seen.out + seen.err).count(line) == 1
    room = {"grape/feedback_points": 1} if problem is CONVNET else {}  # of two blocks
    assert trainer.state.log_history[0] == {PRESET: preset, **room, "step": 0}
    saved = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert [entry for entry in saved["log_history"] if PRESET in entry] == trainer.state.log_history[:1]
    resumed = train(problem, tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)
    assert [entry for entry in resumed.state.log_history if PRESET in entry] == trainer.state.log_history[:1]
    given = train(problem, tmp_path, disable_tqdm=False, max_steps=1, grape_preset=preset)
    assert line not in "".join(capfd.readouterr())
    noted = [entry for entry in given.state.log_history if PRESET in entry]
    assert noted == (trainer.state.log_history[:1] if room else [])  # other than as given, or not at all


def test_without_a_bar_the_settings_stand_before_the_printed_log(tmp_path, capfd):
    trainer = make_trainer(GPT2, tmp_path, grape_preset="auto", max_steps=1)
    trainer.add_callback(PrinterCallback())  # what the stock Trainer has where there is no bar
    trainer.train()
    first, second, *_ = capfd.readouterr().out.splitlines()
    assert first == 'GrAPE: grape_preset="recommended", as there are no convolutions in the blocks.'
    assert "loss" in second
