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
        STAR | {"calibration_strategy": "steps", "calibration_interval": 2, "feedback_points": 1},
        {},
    ),
    "star-images": ("vit", STAR, {}),
}
LARGER = {
    "three": (3, 3, "gpt2-tied", {}, {}),
    "three-star": (3, 3, "llama-tied", STAR | {"feedback_points": 2}, {"pipeline_microbatches": 2}),
    "two-times-two": (4, 2, "llama-tied", ACCUMULATED | {"max_steps": 2}, {}),
    "two-times-two-star": (4, 2, "gpt2-tied", STAR, {}),
}


def compare(ours: list[stages.Trained], alone: stages.Trained) -> None:
    assert_same(ours[0].weights, alone.weights, **CLOSE)
    assert ours[0].files == alone.files
    for stage in ours:
        np.testing.assert_allclose(stage.predictions, alone.predictions, atol=1e-12)
        assert len(stage.log) == len(alone.log)
        for found, expected in zip(stage.log, alone.log, strict=True):
            # At calibration steps one process measures the alignment as well.
            assert found.keys() == {name for name in expected if "alignment" not in name}
            for name in set(COMPARED) & expected.keys():
                # The Trainer adds losses up in float32.
                assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def alone(problem, folder, options):
    kind = GrapeTrainer if options.get("method") == "dfa" else Trainer
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
    expected = alone(problem, tmp_path / "alone", options)
    replicas = world // count
    sizes = {"per_device_train_batch_size": 8 // replicas, "per_device_eval_batch_size": 6 // replicas}
    over = {"method": "bp", "pipeline_stages": count} | sizes | options | of_stages
    found = processes.run_on(world, stages.train, problem, tmp_path / "stages", **over)
    compare(found, expected)
    # A stage holds its own blocks: parameters, gradients and the optimiser's two numbers for each.
    embedding = 31 * 16
    tied = embedding if replicas == 1 or problem.endswith("-tied") else 0
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


def test_direct_feedback_resumes_in_one_process_and_back(processes, tmp_path):
    options = STAR | {"feedback_init": "gaussian", "calibration_strategy": "steps", "calibration_interval": 3}
    saving = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    expected = alone("gpt2-untied", tmp_path / "alone", options | saving)
    over = options | {"pipeline_stages": 2}
    processes.run_on(2, stages.train, "gpt2-untied", tmp_path / "stages", **over, **saving)
    ours, theirs = (str(tmp_path / name / "checkpoint-2") for name in ("stages", "alone"))
    # With the matrices of the checkpoint: those that the seed would draw are others.
    there = alone("gpt2-untied", tmp_path / "a", options | {"resume": ours, "data_seed": 3})
    assert_same(there.weights, expected.weights, **CLOSE)
    here, _ = processes.run_on(2, stages.train, "gpt2-untied", tmp_path / "b", resume=theirs, data_seed=3, **over)
    assert_same(here.weights, expected.weights, **CLOSE)


def test_mixed_precision_is_that_of_the_same_micro_batches(processes, tmp_path):
    """Without clipping and tied weights, whose sums have another order, stages are accumulation bit for bit."""
    options = {"bf16": True, "dtype": torch.float32, "max_grad_norm": 0.0, "eval_strategy": "no"}
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    expected = alone("llama-untied", tmp_path / "alone", options | halves)
    over = options | {"method": "bp", "pipeline_stages": 2, "pipeline_microbatches": 2}
    found, _ = processes.run_on(2, stages.train, "llama-untied", tmp_path / "stages", **over)
    assert_same(found.weights, expected.weights)
