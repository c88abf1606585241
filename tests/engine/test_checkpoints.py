"""A checkpoint is complete or not there, whenever the process is killed; resuming finds the last complete one.

Oracles: the files of an undisturbed save, byte for byte; a run that was never stopped, bit for bit.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LEARNED as ESTIMATES
from helpers import OnEvent, assert_same, logged, make_trainer, train, weights
from killed import run_killed
from problems import GPT2
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from grape_hf import GrapeTrainer
from grape_hf.engine.checkpoints import checkpoint_to_resume, complete_save, faults, last_checkpoint
from grape_hf.engine.state import FEEDBACK_NAME, STATE_NAME

STEADY = {"lr_scheduler_type": "constant"}  # runs of another length are then the same run
SAVED = {"save_strategy": "steps", "save_steps": 5} | STEADY
LEARNED = ESTIMATES | STEADY
FILES = [
    "trainer_state.json",
    "grape_state.json",
    "grape_feedback.safetensors",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
]


def content(checkpoint: str | Path) -> dict[str, bytes]:
    """The files, but for two that hold the output folder's name or length."""
    files = (f for f in Path(checkpoint).iterdir() if f.name not in ("training_args.bin", "grape_state.json"))
    return {f.name: f.read_bytes() for f in files}


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path, caplog):
    """With ``save_total_limit=1``, and an older checkpoint of the same step to be written over."""
    *killed, undisturbed = run_killed("moments", tmp_path)
    assert undisturbed == 0
    assert set(killed) == {-signal.SIGKILL}
    assert len(killed) > 20
    before = content(tmp_path / "whole" / "checkpoint-20")
    after = content(tmp_path / str(len(killed) + 1) / "checkpoint-30")
    assert before != after
    taken = []
    for moment in range(1, len(killed) + 2):
        folder = tmp_path / str(moment)
        caplog.clear()
        last = last_checkpoint(folder)
        assert content(last) in (before, after), f"killed at moment {moment}: {last} is a mixture"
        skipped = (folder / "checkpoint-30").exists() and last.endswith("20")
        assert skipped == ("checkpoint-30, which is incomplete: trainer_state.json" in caplog.text)
        taken.append(content(last) == after)
    assert taken == sorted(taken)
    assert 0 < sum(taken) < len(taken)


@pytest.fixture(scope="module")
def run_of_10(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(GPT2, folder, **SAVED | LEARNED)
    return folder


@pytest.fixture(scope="module")
def after_12_steps(tmp_path_factory):
    return weights(train(GPT2, tmp_path_factory.mktemp("straight"), max_steps=12, **LEARNED))


@pytest.fixture
def saved(run_of_10, tmp_path):
    """checkpoint-5 and checkpoint-10 of a run of 10 steps, to be spoilt."""
    return Path(shutil.copytree(run_of_10, tmp_path / "run"))


@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize("file", FILES)
def test_what_is_not_complete_is_skipped_and_by_name_an_error(file, how, saved, after_12_steps, caplog):
    newest = saved / "checkpoint-10"
    if how == "missing":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes((newest / file).read_bytes()[:-2])
    trainer = make_trainer(GPT2, saved, max_steps=12, **LEARNED)
    says = f"{file}.*is missing" if how == "missing" else f"{file} has .* bytes of|{file}.*cut off"
    with pytest.raises(ValueError, match=rf"checkpoint-10, it is incomplete: ({says}).*is .*checkpoint-5"):
        trainer.train(resume_from_checkpoint=str(newest))
    assert trainer.state.global_step == 0
    caplog.clear()
    trainer.train(resume_from_checkpoint=True)
    assert [step for step, _ in logged(trainer, "loss")] == list(range(1, 13))
    assert f"not resuming from {newest}, which is incomplete: {file}" in caplog.text
    assert_same(weights(trainer), after_12_steps)


def test_the_number_counts_not_the_name(saved):
    assert last_checkpoint(saved) == str(saved / "checkpoint-10")  # "checkpoint-5" is the last by name
    (saved / "checkpoint-11").write_text("a file")
    (saved / "checkpoint-12-of-mine").mkdir()
    assert last_checkpoint(saved) == str(saved / "checkpoint-10")


def test_ways_to_say_that_a_run_resumes(saved, tmp_path):
    newest = str(saved / "checkpoint-10")
    assert checkpoint_to_resume(True, str(saved)) == newest
    assert checkpoint_to_resume("True", str(saved)) == newest  # --resume_from_checkpoint True
    assert checkpoint_to_resume(newest, "elsewhere") == newest
    assert checkpoint_to_resume(None, str(saved)) is None
    assert checkpoint_to_resume(False, str(saved)) is None
    for empty in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match="No valid checkpoint found in .*Leave out resume_from_checkpoint"):
            checkpoint_to_resume(True, str(empty))
    with pytest.raises(ValueError, match=r"checkpoint-7.*no such folder.*last complete one beside it is .*-10"):
        checkpoint_to_resume(str(saved / "checkpoint-7"), str(saved))


@pytest.mark.parametrize("resume", [True, "nowhere/checkpoint-7"])
def test_where_there_is_nothing_to_resume_the_message_begins_as_the_stock_trainers(resume, tmp_path):
    with pytest.raises(ValueError) as stock:  # noqa: PT011, whatever it says
        train(GPT2, tmp_path, Trainer, resume=resume)
    for method in ("bp", "grape"):
        with pytest.raises(ValueError, match="^" + re.escape(str(stock.value))):
            train(GPT2, tmp_path, method=method, resume=resume)


def test_a_stock_trainers_interrupted_save_is_told_apart_too(tmp_path):
    train(GPT2, tmp_path, Trainer, **SAVED)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    resumed = train(GPT2, tmp_path, max_steps=12, method="bp", resume=True, **STEADY)
    assert_same(weights(resumed), weights(train(GPT2, tmp_path / "straight", Trainer, max_steps=12, **STEADY)))


def test_leftovers_are_not_counted_as_checkpoints(saved):
    """A rotation would keep an interrupted checkpoint-14 as the most recent one, and delete the complete ones."""
    left = Path(shutil.copytree(saved / "checkpoint-10", saved / "checkpoint-14"))
    with pytest.raises(OSError, match="full"), complete_save(left, TrainerState()):
        raise OSError("the disk is full")
    os.utime(left, (time.time() + 1000,) * 2)
    more = SAVED | LEARNED | {"save_steps": 4}
    train(GPT2, saved, resume=True, **more | {"max_steps": 12})
    assert {c.name for c in saved.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (5, 10, 12, 14)}
    train(GPT2, saved, resume=True, **more | {"max_steps": 13, "save_total_limit": 1})
    assert {c.name for c in saved.glob("checkpoint-*")} == {"checkpoint-13"}


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_weights_alone_are_no_leftovers(method, tmp_path):
    """A rotation counts them as the stock Trainer's does; nothing that is no interrupted save is deleted beside it."""
    for number in (1000, 2000):
        GPT2.model().save_pretrained(tmp_path / f"checkpoint-{number}")
    train(GPT2, tmp_path, method=method, save_total_limit=4, **SAVED)
    assert {c.name for c in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (5, 10, 1000, 2000)}


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_a_users_own_save_of_the_state_ends_no_save(method, tmp_path):
    class Eager(GrapeTrainer):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call)
            self.save_state()
            assert last_checkpoint(tmp_path) != output_dir
            marked = {f.parent.name for f in tmp_path.glob("checkpoint-*/checkpoint-is-incomplete.txt")}
            assert marked == ({Path(output_dir).name} if _internal_call else set())

    train(GPT2, tmp_path, Eager, method=method, save_total_limit=2, **SAVED)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 10
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("later", [{"method": "bp"}, {"method": "fa"}, {"save_only_model": True}], ids=str)
def test_feedback_of_an_earlier_run_in_the_same_folder_is_gone(later, saved):
    assert (saved / "checkpoint-10" / FEEDBACK_NAME).exists()
    train(GPT2, saved, **SAVED | later)
    assert not {FEEDBACK_NAME, STATE_NAME} & {f.name for f in (saved / "checkpoint-10").iterdir()}


@pytest.mark.parametrize("resume", [None, "checkpoint-5"])
def test_a_checkpoint_behind_an_interrupt_has_the_runs_feedback(resume, saved, tmp_path):
    """``except KeyboardInterrupt: trainer._save_checkpoint(...)``; not that of the checkpoint that it resumed from."""
    options = LEARNED | {"save_strategy": "no"}
    stopped = make_trainer(GPT2, tmp_path / "stopped", max_steps=15, **options)

    def interrupt(state: TrainerState, **_: object) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt

    stopped.add_callback(OnEvent("step_end", interrupt))
    with pytest.raises(KeyboardInterrupt):
        stopped.train(resume_from_checkpoint=None if resume is None else str(saved / resume))
    stopped._save_checkpoint(stopped.model, trial=None)
    straight = train(GPT2, tmp_path / "straight", max_steps=15, **options)
    more = train(GPT2, tmp_path / "more", max_steps=15, resume=str(tmp_path / "stopped" / "checkpoint-8"), **options)
    assert_same(weights(more), weights(straight))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    options = SAVED | LEARNED | {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    more = {"eval_dataset": GPT2.samples(4)}
    trainer = make_trainer(GPT2, tmp_path, more=more, max_steps=20, save_total_limit=1, learning_rate=0.05, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    losses = dict(logged(trainer, "eval_loss"))
    assert best.name == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    assert faults(best) == []
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()))


def test_what_is_pushed_to_the_hub_is_complete(tmp_path):
    pushed = []

    class Pushing(GrapeTrainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            pushed.append((Path(checkpoint_folder).name, faults(Path(checkpoint_folder))))

    trainer = make_trainer(GPT2, tmp_path, Pushing, **SAVED | LEARNED)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [("checkpoint-5", []), ("checkpoint-10", [])]


def test_the_arguments_in_a_checkpoint_are_the_runs(tmp_path):
    trainer = train(GPT2, tmp_path, save_total_limit=1, **SAVED | LEARNED)
    kept = torch.load(tmp_path / "checkpoint-10" / "training_args.bin", weights_only=False)
    assert kept.to_dict() == trainer.args.to_dict()


class Terminated(GrapeTrainer):
    """Gets SIGTERM in the middle of a step, and waits until the request for a checkpoint is there."""

    at = 12

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == self.at and torch.is_grad_enabled():
            (callback,) = (c for c in self.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
            callback.jit_manager.kill_wait = 0
            os.kill(os.getpid(), signal.SIGTERM)
            while not callback.jit_manager.is_checkpoint_requested:
                time.sleep(0.001)
        return super().compute_loss(*args, **kwargs)


REFITTED = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 4, "calibration_refit": True}


@pytest.mark.parametrize("at", [11, 12], ids=["calibration-step", "grape-step"])
def test_sigterm_in_the_middle_of_a_step(at, tmp_path, monkeypatch):
    """The step is done again from what it started from, so B_l must be from before it, and so must the counts."""
    monkeypatch.setattr(Terminated, "at", at)
    stopped = make_trainer(GPT2, tmp_path / "run", Terminated, max_steps=20, enable_jit_checkpoint=True, **REFITTED)
    stopped.train()
    assert stopped.state.global_step == at + 1
    assert last_checkpoint(tmp_path / "run").endswith(f"checkpoint-{at}")
    resumed = train(GPT2, tmp_path / "run", max_steps=20, resume=True, **REFITTED)
    straight = train(GPT2, tmp_path / "straight", max_steps=20, **REFITTED)
    assert_same(weights(resumed), weights(straight))
    for name in ("loss", "grape/calibration/steps"):
        assert logged(resumed, name) == logged(straight, name)


def test_sigterm_before_the_first_step_of_a_resumed_run(saved, tmp_path):
    """B_l is not read yet, and the checkpoint must hold it all the same."""
    stopped = make_trainer(GPT2, tmp_path / "stopped", max_steps=20, enable_jit_checkpoint=True, **LEARNED)
    (callback,) = (c for c in stopped.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    request = OnEvent("train_begin", lambda state, **_: setattr(callback.jit_manager, "is_checkpoint_requested", True))
    stopped.add_callback(request)
    stopped.train(resume_from_checkpoint=str(saved / "checkpoint-10"))
    made = tmp_path / "stopped" / "checkpoint-10"
    kept = saved / "checkpoint-10"
    assert faults(made) == []
    assert (made / FILES[2]).read_bytes() == (kept / FILES[2]).read_bytes()
    straight = train(GPT2, tmp_path / "straight", max_steps=15, **LEARNED)
    assert_same(weights(train(GPT2, tmp_path / "stopped", max_steps=15, resume=True, **LEARNED)), weights(straight))


def test_a_sentinel_of_transformers_says_incomplete(saved):
    (saved / "checkpoint-10" / "checkpoint-is-incomplete.txt").write_text("in progress")
    assert last_checkpoint(saved) == str(saved / "checkpoint-5")
