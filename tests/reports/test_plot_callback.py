"""The pictures of a run under way: when they are drawn, and of what. How they look is in test_plots.py."""

from pathlib import Path
from typing import Any

import pytest
from helpers import LEARNED, OnEvent, make_trainer
from problems import GPT2
from transformers import Trainer, TrainerState

from grape_hf.reports import plot_callback
from grape_hf.reports.plot_callback import PlotCallback, plot_training
from grape_hf.reports.plots import read_history


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last logged step at each drawing; pictures are drawn all the same."""
    steps: list[int] = []

    def draw(history: Any, *args: Any) -> list[Path]:
        steps.append(history[-1]["step"] if history else 0)
        return plot_training(history, *args)

    monkeypatch.setattr(plot_callback, "plot_training", draw)
    return steps


def test_each_checkpoint_finds_its_pictures(tmp_path: Path, drawn: list[int]):
    pictures: list[bytes] = []
    see = OnEvent("save", lambda state, **_: pictures.append((tmp_path / "alignment.png").read_bytes()))
    more = {"callbacks": [PlotCallback(), see]}
    trainer = make_trainer(GPT2, tmp_path, more=more, max_steps=4, save_strategy="steps", save_steps=2, **LEARNED)
    trainer.train()
    assert {2, 4} < set(drawn)
    assert len(set(pictures)) == 2
    again = plot_training(trainer.state.log_history, tmp_path / "again", tmp_path.name)
    assert [path.name for path in again] == ["curves.png", "alignment.png"]
    for path in again:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    trainer.save_state()
    for path in plot_training(read_history(tmp_path), tmp_path / "read", tmp_path.name):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_picture_that_would_be_the_same_is_left_alone(tmp_path: Path):
    """A push in the background may be reading it."""
    history = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    (curves,) = plot_training(history, tmp_path)
    before = curves.stat()
    plot_training(history, tmp_path)
    assert (curves.stat().st_ino, curves.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    plot_training([*history, {"step": 3, "loss": 0.5}], tmp_path)
    assert (
        curves.stat().st_ino != before.st_ino
    )  # another file took its place: who reads the old one goes on reading it
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_drawing_takes_a_hundredth_of_the_time(tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch):
    """With a clock on which a drawing takes one second and the steps nothing or 150 s."""
    now = [0.0]

    def tick() -> float:
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(plot_callback.time, "monotonic", tick)
    wait = OnEvent("step_begin", lambda state, **_: now.__setitem__(0, now[0] + 150 * (state.global_step == 6)))
    make_trainer(GPT2, tmp_path, more={"callbacks": [PlotCallback(), wait]}, **LEARNED).train()
    assert drawn == [1, 7, 10]  # the first, the one after the pause, the end


def test_a_stock_trainer_is_drawn_without_alignment(tmp_path: Path):
    make_trainer(GPT2, tmp_path, Trainer, more={"callbacks": [PlotCallback()]}, max_steps=3).train()
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves.png"]


def test_only_the_main_process_draws(tmp_path: Path):
    trainer = make_trainer(GPT2, tmp_path, max_steps=3, **LEARNED)
    trainer.train()
    other = TrainerState(log_history=trainer.state.log_history, is_world_process_zero=False)
    PlotCallback().on_train_end(trainer.args, other, trainer.control)
    assert not list(tmp_path.glob("*.png"))


def test_without_estimates_the_exact_alignment_is_drawn(tmp_path: Path):
    exact = {"grape/alignment/exact/h_1": 0.5}
    assert [p.name for p in plot_training([{"step": 1, **exact}], tmp_path)] == ["alignment.png"]


def test_nothing_to_draw_is_no_error(tmp_path: Path):
    assert plot_training([], tmp_path) == []
    assert plot_training([{"step": 1, "loss": 2.0}], tmp_path) == []
    assert not list(tmp_path.iterdir())
