"""DDP: two ranks are one machine with a batch twice as large, and their feedback is one and the same.

The oracle is a single process in float64; the section on B_l at the end compares rank with rank.
"""

import jobs
import pytest
import torch
from helpers import LEARNED, assert_same, count_hooks, differ, log_of_grape, weights
from helpers import train as train_alone
from problems import GPT2
from test_trainer import CHECKPOINTING
from transformers import Trainer

# Sums are taken in another order; Adam divides small gradients by their own size.
CLOSE = {"rtol": 0, "atol": 1e-9}
CALIBRATED = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 3, "calibration_refit": True}
RUNS = {
    "grape": LEARNED,
    # Samples 0 and 10 of 16, in both micro-batches the first rank's: the second has none.
    "fraction": LEARNED | {"jvp_fraction": 0.1, "gradient_accumulation_steps": 2},
    "differences": LEARNED | {"jvp_mode": "finite_difference", "jvp_passes": "per_block"},
    "local": LEARNED | {"feedback_rule": "local", "gradient_accumulation_steps": 2, "alignment_steps": 2},
    "swept": LEARNED | {"feedback_rule": "local", "feedback_sweeps": 1, "feedback_path": "shortcut"},
    "block": LEARNED | {"jvp_scope": "block"},
    "paper": {"grape_preset": "paper", "perturbation_space": "weight", "calibration_interval": 0.5},
    "dkp": {"method": "dkp", "ddp_find_unused_parameters": False},
    "refit": CALIBRATED | {"gradient_accumulation_steps": 2},
    "measured": LEARNED | {"alignment_steps": 2, CHECKPOINTING: True},
    "fallback": LEARNED | {"fallback": "block", "fallback_threshold": 0.98, "fallback_patience": 1, "max_steps": 5},
    "static-graph": CALIBRATED | {"ddp_find_unused_parameters": False, "ddp_static_graph": True},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_2_ranks_of_4_are_1_rank_of_8(options, processes, tmp_path):
    options = {"max_steps": 4} | options
    alone = train_alone(GPT2, tmp_path / "alone", dtype=torch.float64, per_device_train_batch_size=8, **options)
    first, second = processes.run(jobs.train, "gpt2", tmp_path / "ranks", **options)
    assert first.wrapper == "DistributedDataParallel"
    tolerance = {"rtol": 0, "atol": 1e-7} if "jvp_mode" in options else CLOSE  # a difference of 1e-6 rms(h)
    assert_same(first.weights, weights(alone), **tolerance)
    assert_same(second.weights, first.weights)
    assert first.hooks == (0, count_hooks(alone.model))  # activation checkpointing leaves one at the embeddings
    assert log_of_grape(first.log) == pytest.approx(log_of_grape(alone.state.log_history), abs=1e-6)


@pytest.mark.parametrize("problem", [jobs.AUXILIARY, jobs.DROPPING], ids=lambda problem: problem.id)
@pytest.mark.parametrize("options", [LEARNED, CALIBRATED, {"method": "dfa", "feedback_init": "gaussian"}])
def test_losses_on_hidden_states_and_blocks_left_out(problem, options, processes, tmp_path):
    options = {"max_steps": 6} | options
    alone = train_alone(problem, tmp_path / "alone", dtype=torch.float64, per_device_train_batch_size=8, **options)
    first, second = processes.run(jobs.train, problem.id, tmp_path / "ranks", **options)
    assert_same(first.weights, weights(alone), **CLOSE)
    assert_same(second.weights, first.weights)


def test_settings_of_ddp(processes, tmp_path):
    """Backpropagation with all hooks at work is the stock Trainer's, and the settings do not touch the feedback."""
    fast = {"ddp_broadcast_buffers": False, "ddp_bucket_cap_mb": 1, "ddp_backend": "gloo", "ddp_timeout": 60}
    usual = {"max_steps": 4, "gradient_accumulation_steps": 2}
    every_step = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 1}
    runs = {}
    for name, options in {"usual": {}, "fast": fast, "own-tokens": {"average_tokens_across_devices": False}}.items():
        stock, _ = processes.run(jobs.train, "llama-padded", tmp_path, trainer=Trainer, **usual, **options)
        ours, _ = processes.run(jobs.train, "llama-padded", tmp_path, **usual, **options, **every_step)
        assert_same({parameter: ours.weights[parameter] for parameter in stock.weights}, stock.weights)
        first, second = processes.run(jobs.train, "llama-padded", tmp_path, **usual, **options, **LEARNED)
        assert_same(first.weights, second.weights)
        runs[name] = first.weights
    assert_same(runs["fast"], runs["usual"], **CLOSE)
    assert differ(runs["own-tokens"], runs["usual"])


@pytest.mark.parametrize(
    ("ranks", "samples"),
    [
        pytest.param({"accelerator_config": {"even_batches": False}}, 14, id="uneven"),
        pytest.param(
            {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 8}, 16, id="split-batches"
        ),
        pytest.param({"accelerator_config": {"dispatch_batches": True}}, 14, id="dispatched"),
        pytest.param({"stream": True}, 14, id="stream"),
        pytest.param({"gradient_accumulation_steps": 2}, 32, id="accumulation"),
    ],
)
def test_a_sample_has_the_place_that_it_has_on_one_rank(ranks, samples, processes, tmp_path):
    """Epochs of which the last batch is smaller, too: 14 are 8 and 6."""
    usual = {"samples": samples, "train_sampling_strategy": "sequential", "max_steps": 4, "method": "dfa"}
    shared = {name: ranks[name] for name in ranks if name in ("stream", "gradient_accumulation_steps")}
    expected = jobs.places(tmp_path / "alone", **usual | shared | {"per_device_train_batch_size": 8})
    first, second = processes.run(jobs.places, tmp_path / "ranks", **usual | ranks)
    assert not first.keys() & second.keys()
    assert first | second == expected


# --- B_l, rank against rank ------------------------------------------------------------------------------------------


def test_feedback_is_the_same_on_both_ranks_after_50_steps(processes, tmp_path):
    """In epochs of 14 samples the second rank's last batch has two: its estimates, errors and losses count less."""
    watchful = {"calibration_strategy": "adaptive", "calibration_threshold": 0.97, "calibration_cooldown": 4}
    uneven = {"samples": 14, "accelerator_config": {"even_batches": False}, "logging_steps": 10}
    options = LEARNED | watchful | {"calibration_refit": True} | uneven
    first, second = processes.run(jobs.train, "llama-padded", tmp_path, max_steps=50, dtype=torch.float32, **options)
    assert first.log[-2]["grape/calibration/steps"] > 2
    assert_same(second.weights, first.weights)
    assert log_of_grape(first.log) == log_of_grape(second.log)


def test_feedback_that_each_rank_starts_for_itself_is_the_first_ranks(processes, tmp_path):
    """The Jacobian of the shortcut path depends on the sample that it is taken at, and each rank has another."""
    identity = {"feedback_space": "logits", "feedback_init": "identity", "method": "dfa", "max_steps": 1}
    first, second = processes.run(jobs.train, "plain-language-model", tmp_path, **identity)
    assert_same(second.weights, first.weights)
