"""FSDP2 through accelerate: sharded weights, whole B_l, the same training as one process's.

accelerate has no FSDP on CPUs, so it is told that the processes are of GPUs (``jobs.as_if_on_gpus``); the sharding, its
collectives over gloo and the Trainer are real. The oracle is a single process in float64.
"""

from pathlib import Path

import jobs
import pytest
import torch
from helpers import LEARNED, assert_same, log_of_grape, make_trainer, weights
from helpers import train as train_alone
from problems import GPT2
from test_ddp import CALIBRATED, CLOSE

WRAPPED = {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
RUNS = {
    # An estimate, a measurement by a backward of its own, and a step in each of two micro-batches.
    "measured": (WRAPPED, LEARNED | {"alignment_steps": 1, "gradient_accumulation_steps": 2}),
    "refit": (WRAPPED | {"reshard_after_forward": False}, CALIBRATED),
    # The first sample of eight: rank 1 has none, and must take part in the forward.
    "local": (WRAPPED, LEARNED | {"feedback_rule": "local", "gradient_accumulation_steps": 2}),
    "fraction": (WRAPPED | {"cpu_ram_efficient_loading": True}, LEARNED | {"jvp_fraction": 0.1}),
    "activation-checkpointing": (WRAPPED | {"activation_checkpointing": True}, CALIBRATED),
    "dkp": ({"auto_wrap_policy": "NO_WRAP"}, {"method": "dkp"}),
    "differences": (WRAPPED, LEARNED | {"jvp_mode": "finite_difference", "feedback_space": "logits"}),
}


@pytest.mark.parametrize(("fsdp", "options"), RUNS.values(), ids=RUNS)
def test_2_ranks_of_4_are_1_rank_of_8(fsdp, options, processes, tmp_path):
    options = {"max_steps": 4} | options
    alone = train_alone(GPT2, tmp_path / "alone", dtype=torch.float64, per_device_train_batch_size=8, **options)
    first, second = processes.run(jobs.train, "gpt2", tmp_path / "ranks", fsdp=fsdp, **options)
    assert first.wrapper == "FSDPGPT2LMHeadModel"
    tolerance = {"rtol": 0, "atol": 1e-7} if "jvp_mode" in options else CLOSE
    assert_same(first.weights, weights(alone), **tolerance)
    assert_same(second.weights, first.weights)
    assert first.hooks[1] > first.hooks[0] == 0  # FSDP2's own stay
    # Of shards there is no whole gradient of a weight to be measured.
    expected = {key: v for key, v in log_of_grape(alone.state.log_history).items() if "weight_gradient" not in key[1]}
    assert log_of_grape(first.log) == pytest.approx(expected, abs=1e-6)


def test_auxiliary_heads_on_shards(processes, tmp_path):
    options = LEARNED | {"max_steps": 4, "alignment_steps": 2, "feedback_space": "hidden"}
    fsdp = {"transformer_layer_cls_to_wrap": ["MixingBlock"]}
    options["per_device_train_batch_size"] = 8
    alone = train_alone(jobs.AUXILIARY, tmp_path / "alone", dtype=torch.float64, **options)
    options["per_device_train_batch_size"] = 4
    first, second = processes.run(jobs.train, jobs.AUXILIARY.id, tmp_path / "ranks", fsdp=fsdp, **options)
    assert_same(first.weights, weights(alone), **CLOSE)
    assert_same(second.weights, first.weights)


@pytest.mark.parametrize(
    ("mode", "threshold", "measured", "given_up"),
    [
        pytest.param("block", 0.98, 0, [0, 0, 0, 1, 1, 1], id="one-block"),
        pytest.param("block", 0.98, 1, [0, 0, 0, 1, 1, 1], id="one-block-by-exact-alignment"),
        pytest.param("block", 1.0, 0, [0, 2, 2, 2, 2, 2], id="each-block"),
        pytest.param("bp", 1.0, 1, [0, 2, 2, 2, 2, 2], id="bp"),
    ],
)
def test_ranks_fall_back_together(mode, threshold, measured, given_up, processes, tmp_path):
    """Some boundaries are cut then and others not, or none: shards are gathered in an ordinary forward again."""
    options = {"fallback": mode, "fallback_threshold": threshold, "fallback_patience": 2, "alignment_steps": measured}
    options = LEARNED | {"max_steps": 6} | options
    alone = train_alone(GPT2, tmp_path / "alone", dtype=torch.float64, per_device_train_batch_size=8, **options)
    first, second = processes.run(jobs.train, "gpt2", tmp_path / "ranks", fsdp=WRAPPED, **options)
    assert_same(first.weights, weights(alone), **CLOSE)
    assert_same(second.weights, first.weights)
    for log in (alone.state.log_history, first.log, second.log):
        assert [entry["grape/fallback/blocks"] for entry in log if "loss" in entry] == given_up


def test_3_steps_and_3_more_are_6(processes, tmp_path):
    options = CALIBRATED | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight, _ = processes.run(jobs.train, "gpt2", tmp_path / "straight", fsdp=WRAPPED, **options)
    saved = tmp_path / "straight" / "checkpoint-3"
    assert [file.name for file in saved.glob("grape_feedback*")] == ["grape_feedback.safetensors"]
    resumed = processes.run(jobs.train, "gpt2", tmp_path / "resumed", fsdp=WRAPPED, resume=str(saved), **options)
    for rank in resumed:
        assert_same(rank.weights, straight.weights)


def test_half_precision_trains(processes, tmp_path):
    options = CALIBRATED | {"max_steps": 6, "bf16": True, "dtype": torch.float32}
    first, second = processes.run(jobs.train, "gpt2", tmp_path, fsdp=WRAPPED, **options)
    assert_same(second.weights, first.weights)
    losses = [entry["loss"] for entry in first.log if "loss" in entry]
    assert losses[-1] < losses[0]
    feedback = [b for name, b in first.weights.items() if name.startswith("B_")]
    assert [b.dtype for b in feedback] == [torch.float32] * 2


# --- what is refused -------------------------------------------------------------------------------------------------


def make(folder: Path, problem: str = "gpt2", train: bool = False, **options: object) -> str:
    """Make a Trainer with FSDP2, and return how it is refused."""
    trainer = None
    try:
        trainer = make_trainer(
            jobs.PROBLEMS[problem], folder, fsdp=True, fsdp_config={}, **options | jobs.as_if_on_gpus()
        )
        if train:
            trainer.train()
    except (ValueError, RuntimeError) as error:
        assert (trainer is None) != train
        return f"{type(error).__name__}: {error}"
    return "not refused"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(
            LEARNED | {"feedback_rule": "cosine", "perturbation_space": "weight"},
            ["ValueError: FSDP2 with perturbation_space='weight'", "Use perturbation_space='activation'."],
            id="weight-space",
        ),
        pytest.param(
            LEARNED | {"jvp_mode": "finite_difference", "bf16": True},
            ["ValueError: FSDP2 in bf16 with jvp_mode='finite_difference'", "Use jvp_mode='dual'"],
            id="differences-in-half-precision",
        ),
        pytest.param(
            {"feedback_space": "logits", "feedback_init": "identity", "feedback_rule": "lms", "train": True},
            ['ValueError: feedback_init="identity"', "FSDP2", 'Use feedback_init="gaussian"'],
            id="shortcut",
        ),
        pytest.param(
            LEARNED | {"problem": "bloom", "train": True},
            ["ForwardModeError", 'Use jvp_mode="finite_difference"'],
            id="no-forward-mode",
        ),
    ],
)
def test_what_shards_cannot_do_is_refused(options, says, processes, tmp_path):
    for refused in processes.run(make, tmp_path, **options):
        for words in says:
            assert words in refused
