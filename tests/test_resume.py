"""Checkpoints hold B_l and the schedule: to stop, or to be killed, and resume is not to have stopped."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import LEARNED, assert_same, count_hooks, differ, logged, make_trainer, train, weights
from killed import KILLED_AT, RUN, run_killed
from packaging.version import Version
from problems import DROPOUT, GPT2, NOISY, PLAIN, WIDTH, PlainLanguageModel, Problem
from test_trainer import CHECKPOINTING
from transformers import Trainer

from grape_hf.core.feedback import Feedback
from grape_hf.engine.state import FEEDBACK_NAME, STATE_NAME

CALIBRATED = LEARNED | {"calibration_refit": True}
RUNS = {
    "recommended": {},
    "grape": LEARNED,
    "paper": {"grape_preset": "paper", "feedback_space": "hidden", "perturbation_space": "activation"},
    "dfa-gaussian": {"method": "dfa", "feedback_init": "gaussian"},
    "measured": LEARNED | {"alignment_steps": 3},
    "local": LEARNED | {"feedback_rule": "local", "jvp_steps": 2, "feedback_sweeps": 1},
    "block": LEARNED | {"jvp_scope": "block", "jvp_steps": 2},
    "accumulation": LEARNED | {"gradient_accumulation_steps": 2, "jvp_fraction": 0.25},
    "bp": {"method": "bp"},
}


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / f"checkpoint-{step}")


def stopped(problem: Problem, folder: Path, at: int = 10, **options: Any) -> str:
    """Train a run of 20 steps, kept at every 5th; return the checkpoint at step ``at``."""
    train(problem, folder, **(dict(max_steps=20, save_strategy="steps", save_steps=5) | options))
    return checkpoint(folder, at)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_15_steps_and_5_more_are_20(options, tmp_path):
    """Epochs have 6 steps, so the run resumes in the middle of one; a new process knows nothing of the old one."""
    run = dict(samples=24, max_steps=20) | options
    straight = train(DROPOUT, tmp_path / "straight", save_strategy="steps", save_steps=5, **run)
    resumed = train(DROPOUT, tmp_path / "resumed", resume=checkpoint(tmp_path / "straight", 15), **run)
    assert_same(weights(resumed), weights(straight))
    names = {name for entry in straight.state.log_history[:-1] for name in entry}
    assert {"loss", "grad_norm"} < names
    for name in names:
        if name.startswith("grape/alignment/estimate") or name == "grape/calibration/last_step":
            # Repeated in the log until there is a new one; a resumed run begins with none.
            assert set(logged(resumed, name)) <= set(logged(straight, name)), name
            # The log up to the checkpoint comes with it; what counts comes after.
            assert "estimate" not in name or logged(resumed, name)[-1] == logged(straight, name)[-1], name
        else:
            assert logged(resumed, name) == logged(straight, name), name
    assert differ(weights(make_trainer(DROPOUT, tmp_path)), weights(straight))


KILLED = {
    "no": LEARNED | {"save_total_limit": 1},
    "epoch": CALIBRATED | {"calibration_strategy": "epoch", "calibration_interval": 0.5},
    "steps": CALIBRATED | {"calibration_strategy": "steps", "calibration_interval": 4},
    "adaptive": CALIBRATED
    | {"calibration_strategy": "adaptive", "calibration_threshold": 0.985, "calibration_cooldown": 4},
    "fallen-back": LEARNED | {"fallback": "block", "fallback_threshold": 0.97, "fallback_patience": 3},
    "falling-back": LEARNED | {"fallback": "bp", "fallback_threshold": 0.99, "fallback_patience": 25},
    "checkpointing": LEARNED | {CHECKPOINTING: True},
}


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """A folder for each run of ``KILLED``: a process of its own was killed in the middle of its save at step 30."""
    folder = tmp_path_factory.mktemp("killed")
    assert run_killed("runs", folder, runs=KILLED) == [-signal.SIGKILL] * len(KILLED)
    return folder


@pytest.mark.parametrize("name", KILLED)
def test_killed_in_the_middle_of_a_save_nothing_is_lost(name, killed_runs, tmp_path, caplog):
    """40 steps are 20 and, after a SIGKILL, 20 more. Parameters, B_l and all that is logged, bit for bit."""
    options = RUN | KILLED[name]
    folder = killed_runs / name
    assert (folder / f"checkpoint-{KILLED_AT}" / "optimizer.pt").exists()
    resumed = train(DROPOUT, folder, resume=True, **options)
    assert f"not resuming from {folder}/checkpoint-30, which is incomplete: trainer_state.json" in caplog.text
    straight = train(DROPOUT, tmp_path, **options)
    assert_same(weights(resumed), weights(straight))
    for log in ("loss", "grad_norm", "learning_rate", "grape/calibration/steps", "grape/fallback/blocks"):
        at_all = "fallback" not in log or "fallback" in options
        assert logged(resumed, log, at_all) == logged(straight, log, at_all)
    if "calibration_strategy" in options:
        assert (
            0 < logged(straight, "grape/calibration/steps")[19][1] < logged(straight, "grape/calibration/steps")[-1][1]
        )
    if "fallback" in options:
        given_up = [number for _, number in logged(straight, "grape/fallback/blocks")]
        assert (given_up[19], given_up[-1]) == {"fallen-back": (1, 1), "falling-back": (0, 2)}[name]


def test_buffers_and_batch_norms_resume_too(tmp_path):
    saved = stopped(NOISY, tmp_path / "straight", **LEARNED)
    straight = train(NOISY, tmp_path / "again", max_steps=20, **LEARNED)
    resumed = train(NOISY, tmp_path / "resumed", max_steps=20, resume=saved, **LEARNED)
    assert_same(weights(resumed), weights(straight))
    assert_same(dict(resumed.model.named_buffers()), dict(straight.model.named_buffers()))


def test_the_feedback_matters_to_what_is_resumed(tmp_path):
    """A run that forgot B_l would notice nothing if B_l had not changed, or did not count."""
    saved = stopped(GPT2, tmp_path / "straight", **LEARNED)
    straight = weights(train(GPT2, tmp_path / "again", max_steps=20, **LEARNED))
    forged = tmp_path / "forged" / "checkpoint-10"
    shutil.copytree(saved, forged)
    first = make_trainer(GPT2, tmp_path / "start", max_steps=1, save_strategy="steps", save_steps=1, **LEARNED)
    first.train()
    shutil.copy(Path(checkpoint(tmp_path / "start", 1)) / "grape_feedback.safetensors", forged)
    resumed = train(GPT2, tmp_path / "resumed", max_steps=20, resume=str(forged), **LEARNED)
    assert differ(straight, weights(resumed))


def test_a_resumed_run_knows_its_calibrations(tmp_path):
    options = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 4}
    saved = stopped(GPT2, tmp_path / "straight", **options)
    resumed = train(GPT2, tmp_path / "resumed", max_steps=20, resume=saved, **options)
    assert logged(resumed, "grape/calibration/steps")[-1] == (20, 5)
    assert logged(resumed, "grape/calibration/share")[-1] == (20, pytest.approx(5 / 20))


def test_the_files_in_a_checkpoint(tmp_path):
    saved = Path(stopped(GPT2, tmp_path, **LEARNED))
    assert (saved / "grape_feedback.safetensors").is_file()
    json.loads((saved / "grape_state.json").read_text())
    stock = tmp_path / "stock"
    train(GPT2, stock, Trainer, max_steps=5, save_strategy="steps", save_steps=5)
    ours = {f.name for f in saved.iterdir()} - {f.name for f in (stock / "checkpoint-5").iterdir()}
    assert ours == {"grape_feedback.safetensors", "grape_state.json"}


def test_save_only_model_saves_the_model_only(tmp_path):
    saved = Path(stopped(GPT2, tmp_path, save_only_model=True, **LEARNED))
    assert (saved / "model.safetensors").is_file()
    assert not list(saved.glob("grape_*"))


def test_a_stock_trainer_resumes_from_ours(tmp_path):
    saved = stopped(GPT2, tmp_path / "ours", max_steps=10, **LEARNED)
    resumed = train(GPT2, tmp_path / "stock", Trainer, max_steps=20, resume=saved)
    assert resumed.state.global_step == 20
    assert [step for step, _ in logged(resumed, "loss")] == list(range(1, 21))


def test_bp_resumes_from_the_stock_trainer(tmp_path):
    saved = stopped(GPT2, tmp_path / "ours", method="bp")
    assert not list(Path(saved).glob("grape_*"))
    stock = train(GPT2, tmp_path / "stock", Trainer, max_steps=20, resume=saved)
    assert_same(weights(train(GPT2, tmp_path / "bp", max_steps=20, method="bp", resume=saved)), weights(stock))


def test_a_checkpoint_of_a_stock_trainer_goes_on_with_fresh_feedback(tmp_path, caplog):
    """It is said, and B_l start as in any new run: the run equals one from a checkpoint with such B_l in it."""
    train(GPT2, tmp_path / "stock", Trainer, max_steps=10, save_strategy="steps", save_steps=10)
    stock = Path(checkpoint(tmp_path / "stock", 10))
    resumed = train(GPT2, tmp_path / "resumed", max_steps=20, resume=str(stock), **LEARNED)
    assert f"no feedback matrices in {stock}" in caplog.text
    assert "start afresh" in caplog.text
    forged = Path(shutil.copytree(stock, tmp_path / "checkpoint-10"))
    Feedback([torch.eye(WIDTH), torch.eye(WIDTH)]).save(forged / FEEDBACK_NAME, ["transformer.h.0", "transformer.h.1"])
    fresh = {"smoothed": None, "last_step": None, "count": 0}
    guards = {"skipped": {"counts": None}, "drift": {"mode": "no", "smoothed": [], "below": [], "given_up": []}}
    state = {"schedule": fresh, "jvp_mode": "dual", "seed": 42, "read_at": None} | guards
    (forged / STATE_NAME).write_text(json.dumps(state))
    caplog.clear()
    again = train(GPT2, tmp_path / "again", max_steps=20, resume=str(forged), **LEARNED)
    assert "afresh" not in caplog.text
    assert_same(weights(resumed), weights(again))


def test_a_checkpoint_with_the_model_only_goes_on_with_fresh_feedback(tmp_path, caplog):
    saved = stopped(GPT2, tmp_path / "straight", save_only_model=True, **LEARNED)
    resumed = train(GPT2, tmp_path / "resumed", max_steps=20, resume=saved, **LEARNED)
    assert "holds the model only" in caplog.text
    assert resumed.state.global_step == 20


DEEP = Problem("five-blocks", lambda: PlainLanguageModel(blocks=5), PLAIN.draw)


def refused(folder: Path, saved: str, **options: Any) -> None:
    """Resuming raises before anything is trained, and leaves no hook."""
    trainer = make_trainer(DEEP, folder, max_steps=20, **options)
    try:
        trainer.train(resume_from_checkpoint=saved)
    finally:
        assert trainer.state.global_step in (0, 10)  # before or after the checkpoint's weights were loaded
        kept = DEEP.model()
        if trainer.state.global_step:
            kept.load_state_dict(torch_weights(saved))
        assert_same(dict(trainer.model.named_parameters()), dict(kept.named_parameters()))
        assert count_hooks(trainer.model) == 0


def torch_weights(saved: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(saved) / "model.safetensors")


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=["empty", "5-bytes", "100-bytes", "last-byte-missing"])
def test_a_truncated_feedback_file_is_refused(size, tmp_path):
    saved = stopped(DEEP, tmp_path / "straight", max_steps=10, **LEARNED)
    file = Path(saved) / "grape_feedback.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"incomplete: grape_feedback.safetensors has [\d,]+ bytes of"):
        refused(tmp_path / "resumed", saved, **LEARNED)


def test_learned_feedback_may_be_resumed_frozen(tmp_path):
    """A fixed identity starts at identities, which need no product; what it reads from a checkpoint are others."""
    saved = stopped(GPT2, tmp_path / "straight", max_steps=10, **LEARNED)
    frozen = train(GPT2, tmp_path / "frozen", max_steps=15, resume=saved, method="dfa", feedback_init="identity")
    unmoved = train(GPT2, tmp_path / "unmoved", max_steps=15, resume=saved, **LEARNED | {"feedback_lr": 0.0})
    assert differ(
        {str(i): b for i, b in enumerate(frozen.feedback)},
        {str(i): torch.eye(len(b)) for i, b in enumerate(frozen.feedback)},
    )
    assert_same(weights(frozen), weights(unmoved))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(None, "grape_state.json is missing", id="missing"),
        pytest.param("", "grape_state.json is cut off", id="empty"),
        pytest.param("{", "grape_state.json is cut off", id="cut"),
        pytest.param("{}", "calibration schedule in .*grape_state.json.*resume from another", id="other"),
    ],
)
def test_a_broken_state_file_is_refused(content, says, tmp_path):
    saved = stopped(DEEP, tmp_path / "straight", max_steps=10, **LEARNED)
    file = Path(saved) / "grape_state.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(ValueError, match=says):
        refused(tmp_path / "resumed", saved, **LEARNED)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"blocks": "blocks.1,blocks.2"}, id="other-blocks"),
        pytest.param({"feedback_points": 1}, id="other-grouping"),
        pytest.param({"feedback_space": "logits", "feedback_init": "gaussian"}, id="other-space"),
    ],
)
def test_feedback_of_another_grouping_or_model_is_refused(other, tmp_path):
    saved = stopped(DEEP, tmp_path / "straight", max_steps=10, **LEARNED)
    with pytest.raises(ValueError, match=r"another model or grouping: expected matrices .*, found .*Resume with"):
        refused(tmp_path / "resumed", saved, **LEARNED | other)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason='transformers 5.17 loads the optimiser to "cpu:0" on several CPU ranks, which torch refuses; 5.23 does not',
)
def test_one_of_two_ranks_is_killed_in_a_save(tmp_path):
    """The first rank must not call a checkpoint complete that lacks the second's file; both go on from the last."""
    first, other, *rest = run_killed("ranks", tmp_path)
    assert first == -signal.SIGKILL
    assert other != 0
    assert rest == [0] * 4
    saved = {
        f"{run}-{rank}": torch.load(tmp_path / f"{run}-{rank}.pt")
        for run in ("resumed", "straight")
        for rank in range(2)
    }
    learned, losses = saved["straight-0"]
    assert {"B_1", "B_2"} < learned.keys()
    for name, (also_learned, also_logged) in saved.items():
        assert_same(also_learned, learned)
        assert also_logged == losses or name.endswith("1"), name  # the second rank logs nothing
    assert len(losses) == 40


@pytest.mark.parametrize(("asked", "used"), [("dual", "dual"), ("auto", "finite_difference")])
def test_a_resumed_run_computes_tangents_as_it_is_asked_to(asked, used, tmp_path):
    """Only where it may choose does it go on as the run before it."""
    options = LEARNED | {"save_strategy": "steps", "save_steps": 2}
    train(GPT2, tmp_path, **options, max_steps=2, jvp_mode="finite_difference")
    resumed = train(GPT2, tmp_path, **options, max_steps=4, jvp_mode=asked, resume=True)
    assert resumed.state.global_step == 4
    assert resumed._run.jvp_mode == used


def test_what_stages_wrote_resumes_with_estimates(tmp_path):
    """They make none, and so have no way to make them."""
    folder = stopped(PLAIN, tmp_path, **LEARNED)
    state = json.loads((Path(folder) / STATE_NAME).read_text())
    (Path(folder) / STATE_NAME).write_text(json.dumps(state | {"jvp_mode": None}))
    resumed = train(PLAIN, tmp_path / "resumed", resume=folder, max_steps=20, **LEARNED)
    assert_same(weights(resumed), weights(train(PLAIN, tmp_path / "straight", max_steps=20, **LEARNED)))
