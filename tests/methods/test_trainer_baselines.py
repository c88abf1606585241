"""Every baseline through the Trainer: it learns, a split batch is the same step, nothing stays behind."""

from typing import Any

import pytest
import torch
from digits import CHANCE, DIGITS, SHALLOW, TINY, batch
from helpers import assert_same, count_hooks, differ, logged, make_trainer, train, weights
from problems import GPT2, NOISY
from test_trainer import CHECKPOINTING
from torch import nn

from grape_hf import GrapeArgumentsMixin
from grape_hf.presets import BASELINES, METHOD_OPTIONS
from grape_hf.training_args import resolved

METHODS: dict[str, dict[str, Any]] = {
    "fa": {"method": "fa"},
    "forward-gradient-activation": {"method": "forward_gradient"},
    "forward-gradient-weight": {"method": "forward_gradient", "perturbation_space": "weight"},
    "pepita": {"method": "pepita"},
    "fdfa": {"method": "fdfa", "feedback_lr": 0.05},
    "dkp": {"method": "dkp"},
}
every_method = pytest.mark.parametrize("method", METHODS)
# The rest have no B_l: all they do is a function of the seed.
stateless = pytest.mark.parametrize("method", [name for name, o in METHODS.items() if o["method"] in BASELINES])


LEARNING = {  # problem, optimiser, rate, optimiser steps
    "fa": (DIGITS, "adamw_torch", 1e-2, 90),
    "forward-gradient-activation": (DIGITS, "adamw_torch", 1e-2, 90),
    "forward-gradient-weight": (TINY, "adamw_torch", 3e-2, 300),
    "pepita": (SHALLOW, "sgd", 1.0, 100),
    "fdfa": (DIGITS, "adamw_torch", 1e-2, 60),
    "dkp": (DIGITS, "adamw_torch", 1e-2, 60),
}


@every_method
def test_it_learns(method, tmp_path):
    """The last quarter's loss is a tenth below that of knowing nothing, and every weight has moved."""
    problem, optimiser, rate, steps = LEARNING[method]
    options = {"optim": optimiser, "learning_rate": rate, "max_steps": steps, "logging_steps": steps // 4}
    trainer = train(problem, tmp_path, samples=256, per_device_train_batch_size=32, **options, **METHODS[method])
    assert logged(trainer, "loss")[-1][1] < 0.9 * CHANCE
    start = dict(problem.model().named_parameters())
    assert differ(start, weights(trainer)) == set(start)
    assert count_hooks(trainer.model) == 0


@every_method
def test_micro_batches_are_the_same_step(method, tmp_path):
    """Two times four samples are eight: in float64, to rounding; the global seed plays no part."""
    options = METHODS[method] | {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    whole = train(DIGITS, tmp_path, dtype=torch.float64, per_device_train_batch_size=8, **options)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    torch.manual_seed(5)
    parts = train(DIGITS, tmp_path, dtype=torch.float64, **split, **options)
    assert_same(weights(parts), weights(whole), rtol=1e-7, atol=1e-9)
    assert differ(dict(DIGITS.model(torch.float64).named_parameters()), weights(whole))


@pytest.mark.parametrize("method", ["fa", "forward-gradient-activation", "pepita", "dkp"])
def test_a_resumed_run_is_the_uninterrupted_one(method, tmp_path):
    options = METHODS[method] | {"max_steps": 6}
    whole = train(DIGITS, tmp_path / "whole", **options)
    train(DIGITS, tmp_path / "first", **options, save_strategy="steps", save_steps=3)
    resumed = train(DIGITS, tmp_path / "second", **options, resume=str(tmp_path / "first" / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))


@every_method
def test_gradients_are_clipped_logged_and_of_finite_size(method, tmp_path):
    trainer = train(
        DIGITS, tmp_path, max_steps=3, optim="sgd", learning_rate=1.0, max_grad_norm=1e-4, **METHODS[method]
    )
    start = dict(DIGITS.model().named_parameters())
    change = sum((p.detach() - start[name]).square().sum() for name, p in trainer.model.named_parameters()).sqrt()
    assert 0 < change < 2.01e-4  # 1e-4 (1 + 2/3 + 1/3): the rate falls linearly
    assert all(0 < norm < 1e3 for _, norm in logged(trainer, "grad_norm"))


class Failure(Exception):
    pass


@every_method
def test_a_failed_step_leaves_nothing(method, tmp_path):
    """Hooks, modes and dual levels are gone: on the same model, backpropagation is what it is on another."""
    trainer = make_trainer(DIGITS, tmp_path, **METHODS[method])
    fail = trainer.model.fc.register_forward_hook(fails_at(3))
    with pytest.raises(Failure):
        trainer.train()
    fail.remove()
    assert count_hooks(trainer.model) == 0
    model = DIGITS.model()
    model.load_state_dict(trainer.model.state_dict())
    inputs = batch(4, torch.float32)
    ours, theirs = (torch.autograd.grad(m(**inputs)["loss"], list(m.parameters())) for m in (trainer.model, model))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def fails_at(call: int) -> Any:
    calls = []

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        calls.append(module)
        if len(calls) == call:
            raise Failure

    return hook


@pytest.mark.parametrize("method", ["fa", "forward-gradient-activation", "forward-gradient-weight"])
@pytest.mark.parametrize(
    ("problem", "bf16"), [(GPT2, True), (NOISY, True), (NOISY, False)], ids=["gpt2-bf16", "noisy-bf16", "noisy"]
)
def test_other_models_and_bf16(problem, method, bf16, tmp_path):
    """The loss of the first step is backpropagation's: same data, same dropout, same forward."""
    options = {"max_steps": 2, "bf16": bf16, "learning_rate": 1e-3}
    trainer = train(problem, tmp_path, **options, **METHODS[method])
    stock = train(problem, tmp_path, **options, method="bp")
    ours, theirs = (logged(t, "loss") for t in (trainer, stock))
    assert ours[0][1] == pytest.approx(theirs[0][1], rel=1e-2 if bf16 else 1e-5)
    start = dict(problem.model().named_parameters())
    assert differ(start, weights(trainer)) == differ(start, weights(stock))
    assert differ(weights(trainer), weights(stock))


def test_evaluation_in_between_changes_nothing(tmp_path):
    for method in ("fa", "pepita"):
        plain = train(DIGITS, tmp_path, max_steps=4, **METHODS[method])
        more = {"eval_dataset": DIGITS.samples(8)}
        evaluated = train(
            DIGITS, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, more=more, **METHODS[method]
        )
        assert_same(weights(evaluated), weights(plain))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_a_method_implies_options_and_a_value_given_wins(method):
    implied = METHOD_OPTIONS[method]
    for preset in ("recommended", "paper"):
        options = resolved(GrapeArgumentsMixin(method=method, grape_preset=preset))
        assert {name: getattr(options, name) for name in implied} == implied
    if method not in BASELINES:
        given = {"feedback_space": "hidden", "feedback_init": "identity", "feedback_lr": 0.3, "jvp_steps": 5}
        options = resolved(GrapeArgumentsMixin(method=method, calibration_strategy="epoch", **given))
        assert {name: getattr(options, name) for name in given} == given
        assert options.calibration_strategy == "epoch"


@stateless
@pytest.mark.parametrize(
    "given", [{"calibration_strategy": "epoch"}, {"calibration_refit": True}, {"alignment_steps": 5}], ids=str
)
def test_what_has_no_feedback_matrices_is_not_calibrated(method, given):
    with pytest.raises(ValueError, match="has no feedback matrices to calibrate or measure: expected.*Leave them out"):
        GrapeArgumentsMixin(**METHODS[method], **given)


def test_contradictions():
    with pytest.raises(ValueError, match='"fdfa" learns by feedback_rule="ema", got \'lms\'.*method="grape"'):
        GrapeArgumentsMixin(method="fdfa", feedback_rule="lms")
    with pytest.raises(ValueError, match="expected perturbation_space='activation' or 'weight', got 'auto'"):
        GrapeArgumentsMixin(method="forward_gradient", perturbation_space="auto")
    with pytest.raises(ValueError, match='method="dkp" makes no estimate'):
        GrapeArgumentsMixin(method="dkp", calibration_strategy="adaptive")


@stateless
def test_settings_that_do_not_go_with_a_baseline(method, tmp_path):
    with pytest.raises(ValueError, match="does not go with torch_compile"):
        make_trainer(DIGITS, tmp_path, torch_compile=True, **METHODS[method])
    with pytest.raises(ValueError, match="does not go with activation checkpointing"):
        make_trainer(DIGITS, tmp_path, **{CHECKPOINTING: True}, **METHODS[method])


def test_resolution(tmp_path):
    with pytest.raises(ValueError, match="bf16, whose resolution"):
        make_trainer(DIGITS, tmp_path, bf16=True, method="pepita")
