"""Any combination of options and inputs trains finitely or is refused before the first step, with a word on which.

Drawn by hypothesis: the same examples in every run, a few hundred of them. To look further, with fresh examples::

    OMP_NUM_THREADS=1 python -m pytest tests/test_fuzz.py --hypothesis-profile=long

takes an hour or so; what it finds is tried first in later runs of that profile.

The oracle is the stock Trainer on the same model and samples. Where it trains, ours trains as well, to finite numbers
if its are; or it refuses, and leaves model and disk as they were. Where it fails (a label out of range), ours may fail
too, and leaves no hooks. B_l is finite in any case.
"""

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from fuzzing import (
    CHANGES,
    MODELS,
    OPTIONS,
    TRAINING,
    Attempt,
    Samples,
    any_options,
    attempt,
    changed_samples,
    proper_options,
    some,
    training_options,
)
from helpers import assert_same, weights
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from problems import MLP, Problem
from transformers import Trainer

from grape_hf import GrapeArgumentsMixin
from grape_hf.training_args import options_of, resolved

EXAMPLES = settings.default.max_examples  # of the profile (conftest.py)


def names(error: Exception, *more: str) -> bool:
    return any(re.search(rf"\b{name}\b", str(error)) for name in (*OPTIONS, *TRAINING, *more))


def check(problem: Problem, samples: Samples, options: dict[str, Any], evaluating: bool = False) -> Attempt:
    with tempfile.TemporaryDirectory() as folder:
        stock = attempt(problem, samples, Path(folder), Trainer, evaluating, **options)
    with tempfile.TemporaryDirectory() as folder:
        ours = attempt(problem, samples, Path(folder), evaluating=evaluating, **options)
    note(f"stock Trainer: {stock}")
    note(f"GrapeTrainer: {ours}")
    feedback = getattr(ours.trainer, "feedback", [])
    assert all(torch.isfinite(b).all() for b in feedback)
    assert ours.after[0]["hooks"] in (ours.before[0]["hooks"], stock.after[0]["hooks"])
    if ours.error is None:
        assert stock.error is None
        assert ours.after[0] | {"modules": 0} == stock.after[0] | {"modules": 0}
        assert ours.finite or not stock.finite
    elif stock.error is None or ours.ours:
        refused(ours, stock)
    else:
        assert type(ours.error) is type(stock.error)
        assert ours.steps <= stock.steps
    return ours


def refused(ours: Attempt, stock: Attempt) -> None:
    assert isinstance(ours.error, ValueError | RuntimeError | FloatingPointError)
    assert ours.ours
    assert names(ours.error)
    if isinstance(ours.error, FloatingPointError):
        assert not stock.finite
        return
    if "feedback_sharing" in str(ours.error) and "samples of one size" in str(ours.error):
        return  # another size can come up at any time
    assert ours.steps == 0
    assert not ours.files
    # What the stock Trainer does to a model before its first step is its own: a hook on the embeddings for activation
    # checkpointing (see ``check``), a cached loss.
    new = [
        set(a) - set(b) - set(s)
        for a, b, s in zip(*(c["attributes"] for c in (ours.after[0], ours.before[0], stock.after[0])), strict=True)
    ]
    assert not any(new)
    others = {"attributes": 0, "hooks": 0}
    assert ours.after[0] | others == ours.before[0] | others
    assert_same(ours.after[1], ours.before[1])


@settings(max_examples=20 * EXAMPLES)
@given(options=any_options)
def test_any_value_of_any_option_is_right_or_refused_by_its_name(options):
    made, refusal = None, ""
    try:
        made = GrapeArgumentsMixin(**options)
    except ValueError as error:
        refusal = str(error)
    if made is None:
        assert any(re.search(rf"\b{name}\b", refusal) for name in options)
        return
    assert made == GrapeArgumentsMixin(**vars(made)) == options_of(made)
    for convolutional in (False, True):  # whatever the model, no later refusal and nothing left open
        values = vars(resolved(made, convolutional))
        assert {name for name, value in values.items() if value is None} <= {"blocks", "pipeline_split"}
    numbers = [value for value in vars(made).values() if isinstance(value, int | float)]
    assert not any(math.isnan(number) for number in numbers)


@settings(max_examples=2 * EXAMPLES)
@given(
    problem=st.sampled_from(MODELS),
    options=proper_options,
    training=training_options,
    number=st.sampled_from([1, 3, 8, 13]),
    evaluating=st.booleans(),
)
def test_any_options_train_finitely_or_are_refused(problem, options, training, number, evaluating):
    check(problem, problem.samples(number), {"max_steps": 3} | training | options, evaluating)


@example(MLP, {}, {}, ("large", 8, some(CHANGES["large"], 1)))  # a change of numbers that the short profile never draws
@settings(max_examples=2 * EXAMPLES)
@given(problem=st.sampled_from(MODELS), options=proper_options, training=training_options, change=changed_samples())
def test_any_samples_are_trained_on_as_well_as_the_stock_trainer_does(problem, options, training, change):
    _, number, changed = change
    check(problem, changed(problem.samples(number)), {"max_steps": 3} | training | options)


@settings(max_examples=EXAMPLES)
@given(
    problem=st.sampled_from(MODELS),
    options=proper_options,
    training=training_options,
)
def test_a_run_of_any_options_that_is_resumed_is_the_uninterrupted_one(problem, options, training):
    options = training | options | {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    samples = problem.samples(8)
    with tempfile.TemporaryDirectory() as folder:
        straight = attempt(problem, samples, Path(folder), **options)
        if straight.error is None and straight.steps == 3:  # not one without a whole batch
            checkpoint = f"{folder}/checkpoint-2"
            resumed = attempt(problem, samples, Path(folder), resume_from_checkpoint=checkpoint, **options)
            note(f"resumed: {resumed}")
            assert resumed.error is None
            assert_same(weights(resumed.trainer), weights(straight.trainer))
