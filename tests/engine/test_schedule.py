"""Which steps of a Trainer are calibration steps, seen in the model itself: is block 2 fed with a graph behind it?"""

from typing import Any

import pytest
import torch
from helpers import LEARNED, arguments, logged
from problems import GPT2, PLAIN
from torch import nn
from transformers import Trainer

from grape_hf import GrapeMixin

STEPS_PER_EPOCH = 8


class Watched(Trainer):
    """Notes for each micro-batch (optimiser step, whether the graph reaches back over h_1)."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        def look(block: nn.Module, args: Any, output: Any) -> None:  # behind all hooks that change its input
            self.seen = [*getattr(self, "seen", []), (self.state.global_step, args[0].requires_grad)]

        blocks = model.blocks if hasattr(model, "blocks") else model.transformer.h
        handle = blocks[1].register_forward_hook(look)
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            handle.remove()


class WatchedGrape(GrapeMixin, Watched):
    pass


def calibrated_steps(folder: Any, epochs: float = 4, micro_batches: int = 1, **options: Any) -> list[int]:
    """Optimiser steps, from 0, that were ordinary backpropagation; the logs must agree."""
    options = {"seed": 3} | LEARNED | options
    args = arguments(
        folder, max_steps=-1, num_train_epochs=epochs, gradient_accumulation_steps=micro_batches, **options
    )
    samples = PLAIN.samples(4 * STEPS_PER_EPOCH * micro_batches)
    trainer = WatchedGrape(PLAIN.model(), args, train_dataset=samples)
    trainer.train()
    steps = round(epochs * STEPS_PER_EPOCH)
    assert len(trainer.seen) == steps * micro_batches
    kinds: dict[int, set[bool]] = {}
    for step, chained in trainer.seen:
        kinds.setdefault(step, set()).add(chained)
    assert all(len(kind) == 1 for kind in kinds.values()), "decided once for all micro-batches of a step"
    taken = [step for step, kind in kinds.items() if True in kind]
    for step in range(steps):
        so_far = sum(t <= step for t in taken)
        assert logged(trainer, "grape/calibration/steps")[step] == (step + 1, so_far)
        assert logged(trainer, "grape/calibration/share")[step] == (step + 1, pytest.approx(so_far / (step + 1)))
    last = [max(t for t in taken if t <= step) + 1 for step in range(steps) if taken and step >= taken[0]]
    assert [value for _, value in logged(trainer, "grape/calibration/last_step", bool(taken))] == last
    assert [step for step, _ in logged(trainer, "grape/alignment/exact/mean", bool(taken))] == [t + 1 for t in taken]
    estimates = dict(logged(trainer, "grape/alignment/estimate/mean"))
    repeated = {step for step in estimates if estimates[step] == estimates.get(step - 1)}
    assert repeated == {t + 1 for t in taken if t > 0}, "no estimate in a calibration step, one in any other"
    return taken


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("interval", "window"), [(1.0, 8), (0.25, 2), (2.0, 16), (0.375, 3)])
def test_one_step_in_every_window_of_epochs(interval, window, micro_batches, tmp_path):
    options = dict(calibration_strategy="epoch", calibration_interval=interval, epochs=6, micro_batches=micro_batches)
    taken = calibrated_steps(tmp_path, **options)
    assert [step // window for step in taken] == list(range(6 * STEPS_PER_EPOCH // window))
    if micro_batches == 1:
        assert calibrated_steps(tmp_path, **options) == taken
    other = calibrated_steps(tmp_path, seed=4, **options)
    assert other != taken
    if window > 2:
        assert len({step % window for step in taken + other}) > 1, "at a random place, not the same in all windows"


def test_every_n_steps(tmp_path):
    assert calibrated_steps(tmp_path, calibration_strategy="steps", calibration_interval=5) == [4, 9, 14, 19, 24, 29]


def test_never(tmp_path):
    assert calibrated_steps(tmp_path, calibration_strategy="no") == []


def test_dfa_calibrates_as_well(tmp_path):
    args = arguments(tmp_path, method="dfa", calibration_strategy="steps", calibration_interval=4)
    trainer = WatchedGrape(GPT2.model(), args, train_dataset=GPT2.samples(32))
    trainer.train()
    assert [step for step, chained in trainer.seen if chained] == [3, 7]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_adaptive_heeds_threshold_and_cooldown(micro_batches, tmp_path):
    options = dict(calibration_strategy="adaptive", calibration_cooldown=6, micro_batches=micro_batches)
    # The cosine is below 1 from the first estimate on (step 0), so only the cooldown keeps it from calibrating.
    assert calibrated_steps(tmp_path, calibration_threshold=1.0, **options) == [1, 7, 13, 19, 25, 31]
    assert calibrated_steps(tmp_path, calibration_threshold=-1.0, **options) == []


def test_adaptive_waits_until_the_alignment_has_fallen(tmp_path):
    """The smoothed alignment is recomputed here from what is logged: of the estimates, as nothing else is measured."""
    args = arguments(
        tmp_path,
        max_steps=40,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        calibration_strategy="adaptive",
        calibration_threshold=0.955,
        calibration_cooldown=4,
        **LEARNED | {"feedback_lr": 0.02},
    )
    trainer = WatchedGrape(GPT2.model(), args, train_dataset=GPT2.samples(64))
    trainer.train()
    taken = [step for step, chained in trainer.seen if chained]
    smoothed, last, expected = None, None, []
    estimates = dict(logged(trainer, "grape/alignment/estimate/mean"))
    for step in range(40):
        rested = last is None or step - last >= 4
        if rested and smoothed is not None and smoothed < 0.955:
            expected.append(step)
            last = step
        else:  # a calibration step makes no estimate
            cosine = estimates[step + 1]
            smoothed = cosine if smoothed is None else 0.9 * smoothed + 0.1 * cosine
    assert taken == expected
    assert 1 < taken[0] < taken[-1] < 35, "after some time, and no more once B has caught up"


def test_adaptive_dfa_watches_the_exact_alignment(tmp_path):
    args = arguments(
        tmp_path,
        method="dfa",
        feedback_init="gaussian",  # its cosine with anything is near 0
        alignment_steps=2,
        calibration_strategy="adaptive",
        calibration_threshold=0.5,
        calibration_cooldown=4,
    )
    trainer = WatchedGrape(GPT2.model(), args, train_dataset=GPT2.samples(32))
    trainer.train()
    # Measuring on the side does not make a step a calibration step.
    assert [step for step, chained in trainer.seen if chained] == [1, 5, 9]
    assert [step for step, _ in logged(trainer, "grape/alignment/exact/mean")] == [1, 2, 3, 5, 6, 7, 9, 10]
