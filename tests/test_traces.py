"""What stays behind after training, or after a failure in it: nothing."""

import gc
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from helpers import LEARNED, OnEvent, assert_same, count_hooks, make_trainer
from problems import DROPOUT, GPT2, NOISY, PLAIN, TUPLES, Problem
from torch import Tensor, nn
from transformers import Trainer

from grape_hf import GrapeMixin, GrapeTrainer

EVERYTHING = LEARNED | dict(
    alignment_steps=2, calibration_strategy="steps", calibration_interval=3, calibration_refit=True
)


def outputs(model: nn.Module, problem: Problem) -> Tensor:
    batch = problem.samples(4)
    inputs = {name: torch.stack([s[name] for s in batch]) for name in batch[0]}
    model.eval()
    with torch.no_grad():
        result = model(**inputs)
    return result["logits"]


def untouched(problem: Problem, trainer: Any) -> None:
    """The model is what a fresh one with the same weights is, in every mode of its life."""
    model, fresh = trainer.model, problem.model()
    assert count_hooks(model) == count_hooks(fresh) == 0
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in fresh.named_modules()]
    for (_, ours), (_, theirs) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() - {"_is_accelerate_prepared"} == theirs.__dict__.keys()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(model, problem), outputs(fresh, problem), rtol=0, atol=0)
    # A backward through it is ordinary again.
    batch = problem.samples(4)
    inputs = {name: torch.stack([s[name] for s in batch]) for name in batch[0]}
    gradients = []
    for m in (model, fresh):
        m.zero_grad()
        m(**inputs)["loss"].backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    assert_same(*gradients)


@pytest.mark.parametrize("method", ["grape", "dfa"])
@pytest.mark.parametrize("problem", [GPT2, TUPLES, NOISY, PLAIN], ids=lambda problem: problem.id)
def test_the_model_is_the_users_again(problem, method, tmp_path):
    trainer = make_trainer(problem, tmp_path, **EVERYTHING | {"method": method})
    trainer.train()
    untouched(problem, trainer)


class Stumble(Exception):
    pass


class Stumbling(Trainer):
    """Fails in the loss, in the n-th call of it."""

    fails_at = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.fails_at -= 1
        if self.fails_at == 0:
            raise Stumble
        return loss


class StumblingGrape(GrapeMixin, Stumbling):
    pass


def failing_block(trainer: GrapeTrainer, calls: int) -> None:
    """Make block 2 fail in its n-th forward. The hook is the test's own, and is taken off when it fires."""

    ran = SimpleQueue[None]()  # a variable would be put back behind passes on the side

    def hook(block: nn.Module, args: Any) -> None:
        ran.put(None)
        if ran.qsize() == calls:
            handle.remove()
            raise Stumble

    handle = trainer.model.transformer.h[1].register_forward_pre_hook(hook)


# Each step runs the model up to three times: estimate, measurement, step; so all of them are hit.
@pytest.mark.parametrize("calls", range(1, 13))
def test_a_failure_in_the_forward(calls, tmp_path):
    trainer = make_trainer(DROPOUT, tmp_path, **EVERYTHING)
    failing_block(trainer, calls)
    with pytest.raises(Stumble):
        trainer.train()
    untouched(DROPOUT, trainer)


@pytest.mark.parametrize("calls", range(1, 6))  # estimates end before the loss
def test_a_failure_in_the_loss(calls, tmp_path):
    made = make_trainer(DROPOUT, tmp_path, **EVERYTHING)
    trainer = StumblingGrape(model=made.model, args=made.args, train_dataset=made.train_dataset)
    trainer.fails_at = calls
    with pytest.raises(Stumble):
        trainer.train()
    untouched(DROPOUT, trainer)


@pytest.mark.parametrize("event", ["step_begin", "pre_optimizer_step", "step_end", "log", "epoch_end", "substep_end"])
def test_a_failure_in_a_callback(event, tmp_path):
    def stumble(state: Any, **_: Any) -> None:
        if state.global_step >= 2:
            raise Stumble

    trainer = make_trainer(
        DROPOUT, tmp_path, gradient_accumulation_steps=2, more={"callbacks": [OnEvent(event, stumble)]}, **EVERYTHING
    )
    with pytest.raises(Stumble):
        trainer.train()
    untouched(DROPOUT, trainer)


def test_training_goes_on_after_a_failure(tmp_path):
    """Another train() of the same Trainer is a run like any other."""
    options = EVERYTHING | {"optim": "sgd"}  # a Trainer keeps its optimiser, and what that remembers
    trainer = make_trainer(PLAIN, tmp_path, **options)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.add_callback(OnEvent("step_end", lambda state, **_: stumble_once()))
    left = [1]

    def stumble_once() -> None:
        if left and left.pop():
            raise Stumble

    with pytest.raises(Stumble):
        trainer.train()
    trainer.model.load_state_dict(weights)
    trainer.train()
    straight = make_trainer(PLAIN, tmp_path, **options)
    straight.train()
    assert_same(dict(trainer.model.named_parameters()), dict(straight.model.named_parameters()))


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is held by a cycle does not count as gone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("problem", [PLAIN, NOISY], ids=lambda problem: problem.id)
def test_no_activation_outlives_its_step(problem, tmp_path):
    """NaN checks, logging and the next step come after ``step_end``: by then h_l, delta_l, y and e are gone."""
    alive: list[weakref.ref] = []
    kept: list[int] = []

    def look(state: Any, **_: Any) -> None:
        kept.append(sum(reference() is not None for reference in alive))
        assert len(alive) >= 3
        alive.clear()

    trainer = make_trainer(problem, tmp_path, more={"callbacks": [OnEvent("step_end", look)]}, **EVERYTHING)

    def watch(module: nn.Module, args: Any, h: Tensor) -> None:
        alive.append(weakref.ref(h))
        if h.requires_grad:
            h.register_hook(lambda error: alive.append(weakref.ref(error)))

    for block in trainer.model.blocks:
        block.register_forward_hook(watch)
        block.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    trainer.train()
    assert kept == [0] * 10
