"""Training over stages is training in one process: parameters, losses, norms, evaluations, predictions, folders.

The oracle is the stock Trainer in one process, in float64; for direct feedback, GrapeTrainer with the same feedback
points. Tolerances are rounding: sums are taken in another order.
"""

import numpy as np
import pytest
import stages
import torch
from helpers import assert_same, differ
from test_trainer import CHECKPOINTING
from transformers import Trainer

from grape_hf import GrapeTrainer

CLOSE = {"rtol": 0, "atol": 1e-12}
COMPARED = ("loss", "grad_norm", "eval_loss", "train_loss", "learning_rate", "total_flos", "epoch")
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_steps": 3}
STAR = {"method": "dfa", "feedback_space": "hidden", "feedback_init": "identity"}

LOCAL = {"method": "grape", "feedback_space": "hidden", "feedback_rule": "local", "feedback_lr": 0.3, "jvp_steps": 1}
CALIBRATED = {"calibration_strategy": "steps", "calibration_interval": 2}
MEASURED = {"alignment_steps": 1, "logging_steps": 1, "max_steps": 5}
ONE = {"pipeline_microbatches": 1}

# By name: problem, options of both, options of the stages alone.
RUNS = {
    "1f1b": ("gpt2-tied", {"max_steps": 5}, {"pipeline_microbatches": 4}),
    "gpipe": ("llama-untied", {}, {"pipeline_microbatches": 2, "pipeline_schedule": "gpipe"}),
    "one-micro-batch": ("gpt2-untied", {"max_grad_norm": 0.0}, {"pipeline_microbatches": 1}),
    "uneven-split": ("llama-tied", {CHECKPOINTING: True}, {"pipeline_split": "1,3"}),
    "accumulation": ("llama-tied", ACCUMULATED | {"lr_scheduler_type": "cosine"}, {}),
    "smoothing": ("gpt2-untied", {"label_smoothing_factor": 0.1}, {}),
    "own-loss": ("gpt2-untied", {"more": {"compute_loss_func": stages.smoothed_loss}}, {}),
    "own-mean": ("llama-untied", {"trainer": stages.MeanLoss, "method": "bp", **ACCUMULATED}, {}),
    "stream": ("gpt2-untied", {"stream": True}, {}),
    "masked-language-model": ("bert", {}, {"pipeline_microbatches": 2}),
    "images": ("vit", {}, {}),
    "star": ("gpt2-tied", STAR | {"feedback_points": 1}, {}),
    "star-gaussian": ("llama-untied", STAR | {"feedback_init": "gaussian"} | ACCUMULATED, {"pipeline_microbatches": 2}),
    "star-calibrated": (
        "gpt2-untied",
        STAR | CALIBRATED | {"feedback_points": 1, "logging_steps": 1},
        {},
    ),
    "star-images": ("vit", STAR, {}),
    "star-padded-sentences": ("bert-classifier", STAR, ONE),
    "local-padded-sentences": ("bert-classifier", LOCAL, ONE),
    "frozen-below": ("gpt2-frozen", {}, {}),
    "star-frozen-below": ("gpt2-frozen", STAR, {}),
    "local-frozen-below": ("gpt2-frozen", LOCAL, ONE),
    "star-frozen-within": ("gpt2-partly-frozen", STAR, {}),
    "frozen-within": ("gpt2-partly-frozen", {}, {}),
    "local": ("gpt2-tied", LOCAL | {"feedback_points": 1, "logging_steps": 1}, ONE),
    "local-calibrated": ("llama-untied", LOCAL | CALIBRATED | {"max_steps": 6, "logging_steps": 1}, ONE),
    "local-gaussian": ("gpt2-untied", LOCAL | ACCUMULATED | {"feedback_init": "gaussian", "jvp_steps": 2}, ONE),
    "local-unit-length": ("gpt2-untied", LOCAL | {"feedback_normalize": True}, ONE),
    "local-padded": ("llama-tied", LOCAL | {CHECKPOINTING: True}, ONE | {"pipeline_split": "1,3"}),
    "local-images": ("vit", LOCAL, ONE),
    "local-long": ("gpt2-long", LOCAL | {"jvp_steps": 2, "max_steps": 5}, ONE),
    "star-measured": ("gpt2-tied", STAR | ACCUMULATED | MEASURED, ONE),
    "local-measured": ("llama-untied", LOCAL | MEASURED | CALIBRATED, ONE),
    "local-measured-points": ("gpt2-untied", LOCAL | MEASURED | {"feedback_points": 1}, ONE),
    # As users have it: the preset is chosen by the blocks, of which a stage has only some.
    "local-auto": ("gpt2-untied", LOCAL | {"grape_preset": "auto", "by_init": True}, ONE),
    "star-auto": ("gpt2-tied", STAR | {"grape_preset": "auto"}, ONE | {"pipeline_split": "1,3"}),
    "local-twice": ("gpt2-untied", LOCAL | {"trainings": 2, "logging_steps": 1}, ONE),
}
LARGER = {
    "three": (3, 3, "gpt2-tied", {}, {}),
    "three-star": (3, 3, "llama-tied", STAR | {"feedback_points": 2}, {"pipeline_microbatches": 2}),
    "three-local": (3, 3, "llama-untied", LOCAL | CALIBRATED | {"max_steps": 5, "logging_steps": 1}, ONE),
    "three-local-points": (3, 3, "gpt2-tied", LOCAL | {"feedback_points": 2, "max_grad_norm": 0.0}, ONE),
    "two-times-two-local": (4, 2, "gpt2-tied", LOCAL | CALIBRATED | MEASURED | {"max_steps": 4}, ONE),
    "two-times-two": (4, 2, "llama-tied", ACCUMULATED | {"max_steps": 2}, {}),
    "two-times-two-star": (4, 2, "gpt2-tied", STAR, {}),
}


def compare(ours: list[stages.Trained], alone: stages.Trained, apart: tuple[str, ...] = ()) -> None:
    assert_same(ours[0].weights, alone.weights, **CLOSE)
    assert ours[0].files == alone.files
    assert [stage.batches for stage in ours if stage.batches > 2] == [], "batches are let go"
    for stage in ours:
        np.testing.assert_allclose(stage.predictions, alone.predictions, atol=1e-12)
        assert len(stage.log) == len(alone.log)
        for found, expected in zip(stage.log, alone.log, strict=True):
            assert found.keys() == expected.keys()
            for name in expected:
                if (name in COMPARED or name.startswith("grape/")) and name not in apart:
                    if isinstance(expected[name], str):  # the preset
                        assert found[name] == expected[name]
                        continue
                    # The Trainer adds losses up in float32.
                    assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6, nan_ok=True), name


def alone(problem, folder, options):
    kind = GrapeTrainer if options.get("method") in ("dfa", "grape") else Trainer
    return stages.train(problem, folder, **({"trainer": kind} | options))


@pytest.mark.parametrize("run", RUNS)
def test_two_stages(run, processes, tmp_path):
    problem, options, of_stages = RUNS[run]
    expected = alone(problem, tmp_path / "alone", options)
    over = {"method": "bp", "pipeline_stages": 2} | options | of_stages
    compare(processes.run_on(2, stages.train, problem, tmp_path / "stages", **over), expected)


@pytest.mark.parametrize("run", LARGER)
def test_more_stages_and_replicas(run, processes, tmp_path):
    world, count, problem, options, of_stages = LARGER[run]
    replicas = world // count
    # A map's step is bounded by each backward's own errors, so that two halves are not one whole.
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} if "local" in run else {}
    expected = alone(problem, tmp_path / "alone", options | (halves if replicas == 2 else {}))
    sizes = {"per_device_train_batch_size": 8 // replicas, "per_device_eval_batch_size": 6 // replicas}
    over = {"method": "bp", "pipeline_stages": count} | sizes | options | of_stages
    found = processes.run_on(world, stages.train, problem, tmp_path / "stages", **over)
    compare(found, expected, ("epoch",) if halves and replicas == 2 else ())  # the last batch of an epoch is a half
    # A stage holds its own blocks: parameters, gradients and the optimiser's two numbers for each.
    embedding = 31 * 16
    tied = embedding if problem.endswith("-tied") else 0
    assert sum(stage.parameters[0] for stage in found[:count]) == alone_numbers(expected) + tied
    assert all(stage.parameters == (n, n, 2 * n) for stage in found for n in stage.parameters[:1])


def alone_numbers(trained: stages.Trained) -> int:
    return trained.parameters[0]


def test_checkpoints_go_from_anywhere_to_anywhere(processes, tmp_path):
    """4 steps, and 2 from a checkpoint after 2, wherever that comes from."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    over = {"method": "bp", "pipeline_stages": 2}
    expected = alone("gpt2-tied", tmp_path / "alone", saving)
    whole, _ = processes.run_on(2, stages.train, "gpt2-tied", tmp_path / "stages", **over, **saving)
    ours, stock = (str(tmp_path / name / "checkpoint-2") for name in ("stages", "alone"))
    again, _ = processes.run_on(2, stages.train, "gpt2-tied", tmp_path / "a", resume=ours, **over)
    assert_same(again.weights, whole.weights)
    more = over | {"pipeline_stages": 3}
    three, *_ = processes.run_on(3, stages.train, "gpt2-tied", tmp_path / "b", resume=ours, **more)
    assert_same(three.weights, expected.weights, **CLOSE)
    assert_same(alone("gpt2-tied", tmp_path / "c", {"resume": ours}).weights, expected.weights, **CLOSE)
    here, _ = processes.run_on(2, stages.train, "gpt2-tied", tmp_path / "d", resume=stock, **over)
    assert_same(here.weights, expected.weights, **CLOSE)


def test_dropout_and_the_best_model(processes, tmp_path):
    """Each stage draws its own masks: the run repeats, resumes bit for bit, and is not that of one process."""
    over = {"method": "bp", "pipeline_stages": 2, "save_strategy": "steps", "save_steps": 2}
    run = ("gpt2-dropout", tmp_path / "a")
    whole, _ = processes.run_on(2, stages.train, *run, **over)
    resumed = {"resume": str(tmp_path / "a" / "checkpoint-2")}
    again, _ = processes.run_on(2, stages.train, "gpt2-dropout", tmp_path / "b", **over, **resumed)
    assert_same(again.weights, whole.weights)
    assert differ(alone("gpt2-dropout", tmp_path / "c", {}).weights, whole.weights)
    best = {"load_best_model_at_end": True, "learning_rate": 0.3, "save_total_limit": 1}  # so high that it gets worse
    options = best | {"save_strategy": "steps", "save_steps": 2}
    expected = alone("llama-untied", tmp_path / "d", options)
    found = processes.run_on(2, stages.train, "llama-untied", tmp_path / "e", **over | best)
    compare(found, expected)


@pytest.mark.parametrize("method", [STAR | {"feedback_init": "gaussian"}, LOCAL | ONE])
def test_direct_feedback_resumes_in_one_process_and_back(method, processes, tmp_path):
    options = method | {"calibration_strategy": "steps", "calibration_interval": 3}
    options |= {"max_steps": 6}  # two steps in a row after the calibration, so that what the maps are matters
    saving = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    expected = alone("gpt2-untied", tmp_path / "alone", options | saving)
    over = options | {"pipeline_stages": 2}
    whole, _ = processes.run_on(2, stages.train, "gpt2-untied", tmp_path / "stages", **over, **saving)
    ours, theirs = (str(tmp_path / name / "checkpoint-2") for name in ("stages", "alone"))
    # With the matrices of the checkpoint: those that the seed would draw are others.
    there = alone("gpt2-untied", tmp_path / "a", options | {"resume": ours, "data_seed": 3})
    assert_same(there.weights, expected.weights, **CLOSE)
    here, _ = processes.run_on(2, stages.train, "gpt2-untied", tmp_path / "b", resume=theirs, data_seed=3, **over)
    assert_same(here.weights, expected.weights, **CLOSE)
    again, _ = processes.run_on(2, stages.train, "gpt2-untied", tmp_path / "c", resume=ours, data_seed=3, **over)
    assert_same(again.weights, whole.weights)
    three = over | {"pipeline_stages": 3}
    more, *_ = processes.run_on(3, stages.train, "gpt2-untied", tmp_path / "d", resume=ours, data_seed=3, **three)
    assert_same(more.weights, expected.weights, **CLOSE)


STAR = {"method": "dfa", "feedback_init": "gaussian", "feedback_space": "hidden", "feedback_points": 1}


@pytest.mark.parametrize("method", [{"method": "bp"}, STAR], ids=["bp", "star"])
def test_mixed_precision_is_that_of_the_same_micro_batches(processes, tmp_path, method):
    """Without clipping and tied weights, whose sums have another order, stages are accumulation bit for bit."""
    options = {"bf16": True, "dtype": torch.float32, "max_grad_norm": 0.0, "eval_strategy": "no"}
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    expected = alone("llama-untied", tmp_path / "alone", options | halves | method)
    over = options | method | {"pipeline_stages": 2, "pipeline_microbatches": 2}
    found, _ = processes.run_on(2, stages.train, "llama-untied", tmp_path / "stages", **over)
    assert_same(found.weights, expected.weights)
