"""What the stock Trainer offers beside plain training goes on working, for every setting of ``TrainingArguments``.

The oracle is the stock Trainer with the same setting, bit for bit: against ``method="bp"``, and against a run that
calibrates at every step, which is backpropagation too but with all of GrAPE's hooks at work. A GrAPE run is compared
with one without the setting, or done otherwise.
"""

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from datasets import Dataset
from helpers import LEARNED, OnEvent, assert_same, count_hooks, differ, logged, make_trainer, train, weights
from problems import DROPOUT, GPT2, PADDED, PLAIN, PlainLanguageModel, Problem, Sample, gpt2
from test_trainer import CHECKPOINTING, accuracy
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from grape_hf import GrapeTrainer
from grape_hf.core.isolation import _products, full_precision

CALIBRATED = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 1}
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
OURS = ("grape/",)
TIMES = ("runtime", "per_second", "mem_")


def history(trainer: Trainer) -> list[dict[str, Any]]:
    """All that was logged, without GrAPE's own and without what the clock or the memory says."""
    return [
        {k: v for k, v in entry.items() if not k.startswith(OURS) and not any(t in k for t in TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same_run(ours: Trainer, stock: Trainer) -> None:
    learned = {name: p for name, p in weights(ours).items() if not name.startswith("B_")}
    assert_same(learned, weights(stock))
    assert history(ours) == history(stock) != []
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen


def assert_backpropagation_is_the_stock_trainers(make: Callable[..., Trainer]) -> Trainer:
    """Return the stock Trainer; ``make(kind, **options)`` makes one and trains it."""
    stock = make(Trainer)
    assert_same_run(make(GrapeTrainer, method="bp"), stock)
    assert_same_run(make(GrapeTrainer, **CALIBRATED), stock)
    return stock


# --- settings, one by one --------------------------------------------------------------------------------------------

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2}
WORKERS = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
# Settings that change nothing in what is learned.
NEUTRAL: dict[str, dict[str, Any]] = {
    "checkpointing": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    "memory": {"torch_empty_cache_steps": 1, "tf32": False, "average_tokens_across_devices": False},
    "length-in-epochs": {"max_steps": -1, "num_train_epochs": 0.5, "dataloader_drop_last": True},
    "worker": WORKERS | {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1},
    "worker-in-any-order": WORKERS | {"dataloader_in_order": False},
    "accelerator": {
        "accelerator_config": {"split_batches": True, "non_blocking": True},
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
    },
    "fp16": {"fp16": True},  # accelerate has no autocast for it on a CPU; the scaler: test_guard.py
    "log-some": {"logging_first_step": True, "logging_steps": 3, "include_num_input_tokens_seen": "all"},
    "log-epochs": {"logging_strategy": "epoch", "include_num_input_tokens_seen": "non_padding"},
    "log-nothing": {"logging_strategy": "no", "logging_nan_inf_filter": False},
    "debug": {"debug": "underflow_overflow"},
    "evaluation": EVALUATED | {"eval_delay": 1, "per_device_eval_batch_size": 3, "eval_accumulation_steps": 1},
    "evaluation-at-start": EVALUATED
    | {"eval_on_start": True, "include_for_metrics": ["inputs", "loss"], "eval_use_gather_object": True},
    "evaluation-by-batch": EVALUATED | {"batch_eval_metrics": True, "bf16_full_eval": True},
    "evaluation-of-loss": EVALUATED
    | {"prediction_loss_only": True, "eval_do_concat_batches": False, "fp16_full_eval": True},
    "save-the-best": EVALUATED
    | {"save_strategy": "best", "metric_for_best_model": "accuracy", "greater_is_better": True},
    "save": SAVED | {"save_on_each_node": True, "save_only_model": True, "save_total_limit": 1},
}
# Settings that change it.
TELLING: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "label-smoothing": {"label_smoothing_factor": 0.3},
    "order": {"train_sampling_strategy": "sequential"},
    "data-seed": {"data_seed": 7},
    "optimiser": {"warmup_steps": 2, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3},
    "clipping": {"max_grad_norm": 0.01},
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    },
}
if "activation_checkpointing" in FIELDS:  # what transformers 5.23 has with the new name
    NEUTRAL["checkpointing-every-2nd"] = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"every_n_layers": 2},
    }
SETTINGS = NEUTRAL | TELLING


class BatchedAccuracy:
    """As ``batch_eval_metrics`` wants it: called with each batch, and with the last one asked for the result."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        guesses, labels = (torch.as_tensor(t) for t in (prediction.predictions, prediction.label_ids))
        self.values.append(float((guesses[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()))
        if not compute_result:
            return {}
        mean, self.values = sum(self.values) / len(self.values), []
        return {"accuracy": mean}


def with_setting(problem: Problem, folder: Path, kind: type[Trainer], **options: Any) -> Trainer:
    metrics: Any = BatchedAccuracy() if options.get("batch_eval_metrics") else accuracy
    more = {"eval_dataset": problem.samples(4), "compute_metrics": metrics}
    # A copy: the stock Trainer writes into the dictionaries.
    return train(problem, folder, kind, more=more, **({"max_steps": 4} | copy.deepcopy(options)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[[int], dict[str, Tensor]]:
    """Return what a GrAPE run of some steps without any setting learned."""

    @cache
    def after(steps: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return weights(with_setting(GPT2, tmp_path_factory.mktemp("plain"), GrapeTrainer, max_steps=steps, **LEARNED))

    return after


# Python 3.12 warns of every fork; the workers load data and compute nothing.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_means_what_it_means_to_the_stock_trainer(name, plain, tmp_path):
    setting = SETTINGS[name]
    assert_backpropagation_is_the_stock_trainers(
        lambda kind, **options: with_setting(DROPOUT, tmp_path / kind.__name__, kind, **setting, **options)
    )
    ours = with_setting(GPT2, tmp_path / "grape", GrapeTrainer, **setting, **LEARNED)
    expected = plain(ours.state.global_step)
    if name in NEUTRAL:
        # Without dropout: every evaluation draws a random number, and has the masks that follow be others.
        assert_same(weights(ours), expected, **({"rtol": 1e-5, "atol": 1e-7} if "checkpointing" in name else {}))
    else:
        assert len(differ(weights(ours), expected)) == len(expected)


def test_a_cache_of_keys_and_values(tmp_path):
    """Its copy has another layout, whose product another routine takes on some CPUs in the JVP: equal but for rounding.

    With Adam's usual epsilon, rounding is all that the gradient of a bias of the keys consists of.
    """
    cache = {"use_cache": True}
    assert_backpropagation_is_the_stock_trainers(
        lambda kind, **options: with_setting(DROPOUT, tmp_path / kind.__name__, kind, **cache, **options)
    )
    cached, plain = (
        weights(with_setting(GPT2, tmp_path / "grape", GrapeTrainer, adam_epsilon=1e-3, **setting, **LEARNED))
        for setting in (cache, {})
    )
    assert_same(cached, plain, rtol=1e-5, atol=1e-6)


def test_memory_metrics(tmp_path):
    """The stock Trainer looks at who calls it; in a single run, for a thread of it reads the memory without a pause."""
    trainer = train(PLAIN, tmp_path, max_steps=1, skip_memory_metrics=False, **LEARNED)
    assert logged(trainer, "train_mem_cpu_alloc_delta")


@pytest.fixture
def global_settings_kept() -> Iterator[None]:
    kept, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    os.environ.clear()
    os.environ |= kept


@pytest.mark.usefixtures("global_settings_kept")
def test_full_determinism(tmp_path):
    """Torch then refuses operators that are not deterministic."""
    options = {"full_determinism": True, "max_steps": 4, "alignment_steps": 2}
    assert_backpropagation_is_the_stock_trainers(
        lambda kind, **others: train(DROPOUT, tmp_path, kind, **options | others),
    )
    assert torch.are_deterministic_algorithms_enabled()
    ours = train(DROPOUT, tmp_path, **options, **LEARNED)
    assert_same(weights(ours), weights(train(DROPOUT, tmp_path, **options, **LEARNED)))


@pytest.mark.parametrize("setting", [{"ignore_data_skip": True}, {"restore_callback_states_from_checkpoint": True}])
def test_ways_to_resume(setting, tmp_path):
    def resumed(kind: type[Trainer], **options: Any) -> Trainer:
        folder = tmp_path / f"{kind.__name__}-{options.get('calibration_interval')}"
        options |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        train(DROPOUT, folder, kind, samples=20, **options)
        return train(DROPOUT, folder, kind, samples=20, resume=f"{folder}/checkpoint-3", **options, **setting)

    assert_backpropagation_is_the_stock_trainers(resumed)


# --- data of different lengths ---------------------------------------------------------------------------------------


def sentences() -> Dataset:
    """Of 3 to 8 tokens, with a column for their length and one that no model knows."""
    samples = [sample["input_ids"][: 3 + number % 6].tolist() for number, sample in enumerate(PADDED.samples(24))]
    return Dataset.from_list([{"input_ids": s, "size": len(s), "comment": f"of {len(s)}"} for s in samples])


def padded(samples: list[dict[str, Any]]) -> Sample:
    assert all(s.keys() in ({"input_ids"}, {"input_ids", "size", "comment"}) for s in samples)
    longest = max(len(s["input_ids"]) for s in samples)
    ids = torch.tensor([s["input_ids"] + [0] * (longest - len(s["input_ids"])) for s in samples])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100), "attention_mask": (ids != 0).long()}


def test_batches_of_like_lengths(tmp_path):
    """From a data set with a column too many, by the lengths of the tokens and by those in a column."""

    def run(kind: type[Trainer], **options: Any) -> Trainer:
        options = {"max_steps": 6, "train_sampling_strategy": "group_by_length"} | options
        return train(PADDED, tmp_path, kind, more={"train_dataset": sentences(), "data_collator": padded}, **options)

    kept = {"remove_unused_columns": False}
    stock = assert_backpropagation_is_the_stock_trainers(run)
    by_column = {"length_column_name": "size"} | kept
    assert_same_run(run(GrapeTrainer, **by_column, **CALIBRATED), run(Trainer, **by_column))
    assert differ(weights(run(Trainer, train_sampling_strategy="random")), weights(stock))
    ours = run(GrapeTrainer, **LEARNED)
    assert_same(weights(run(GrapeTrainer, **kept, **LEARNED)), weights(ours))
    assert_same(weights(run(GrapeTrainer, **by_column, **LEARNED)), weights(ours))


# --- optimisers and schedules ----------------------------------------------------------------------------------------


RUN_ANYWHERE = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


@pytest.mark.parametrize("name", [o.value for o in OptimizerNames])
def test_every_optimizer_works_or_fails_as_with_the_stock_trainer(name, tmp_path):
    """Those that want CUDA, another accelerator, or a package that is not installed fail."""

    def run(kind: type[Trainer], **options: Any) -> Trainer:
        return train(PLAIN, tmp_path, kind, optim=name, optim_target_modules=["up", "down"], max_steps=3, **options)

    failure = None
    try:
        stock = run(Trainer)
    except Exception as error:
        failure = error
    if failure is not None:
        assert name not in RUN_ANYWHERE
        with pytest.raises(type(failure)) as raised:
            run(GrapeTrainer, **LEARNED)
        assert str(raised.value) == str(failure)
        return
    assert_same_run(run(GrapeTrainer, method="bp"), stock)
    assert_same_run(run(GrapeTrainer, **CALIBRATED), stock)
    ours = weights(run(GrapeTrainer, **LEARNED))
    assert all(torch.isfinite(p).all() for p in ours.values())
    untrained = weights(make_trainer(PLAIN, tmp_path, Trainer))
    assert differ(untrained, ours) == set(untrained)
    assert differ(weights(stock), ours)


def test_arguments_for_an_optimizer(tmp_path):
    options = {"optim": "rmsprop", "optim_args": "momentum=0.9, alpha=0.5", "max_steps": 3}
    stock = assert_backpropagation_is_the_stock_trainers(lambda kind, **o: train(PLAIN, tmp_path, kind, **options | o))
    assert stock.optimizer.param_groups[0]["momentum"] == 0.9


class TwoWeights(torch.optim.SGD):
    """As schedule-free optimisers have them: an evaluation sees the mean of all weights so far, training the last."""

    averaging = False

    def train(self) -> None:
        self._swap(False)

    def eval(self) -> None:
        self._swap(True)

    def _swap(self, averaging: bool) -> None:
        if averaging != self.averaging:
            self.averaging = averaging
            for p, state in self.state.items():
                p.data, state["other"] = state["other"], p.data

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                number = state["number"] = state.get("number", 0) + 1
                mean = state.get("other", torch.zeros_like(p))
                state["other"] = mean + (p.detach() - mean) / number


def test_an_optimizer_with_other_weights_for_an_evaluation(tmp_path):
    def run(**options: Any) -> Trainer:
        model = GPT2.model()
        optimizer = TwoWeights(model.parameters(), lr=0.3)
        more = {"model": model, "optimizers": (optimizer, None), "eval_dataset": GPT2.samples(4)}
        trainer = train(GPT2, tmp_path, more=more, max_steps=6, alignment_steps=1, **LEARNED, **options)
        optimizer.train()
        return trainer

    ours, undisturbed = run(eval_strategy="steps", eval_steps=1), run()
    assert_same(weights(ours), weights(undisturbed))
    assert logged(ours, "grape/alignment/exact/mean") == logged(undisturbed, "grape/alignment/exact/mean")


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0},
}


@pytest.mark.parametrize("kind", [s.value for s in SchedulerType])
def test_every_schedule(kind, tmp_path):
    options: dict[str, Any] = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": SCHEDULES.get(kind), "warmup_steps": 2}
    more = {"eval_dataset": PLAIN.samples(4)}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    stock = train(PLAIN, tmp_path, Trainer, more=more, **options)
    assert_same_run(train(PLAIN, tmp_path, more=more, **options, **CALIBRATED), stock)
    ours = train(PLAIN, tmp_path, more=more, **options, **LEARNED)
    if kind not in ("reduce_lr_on_plateau", "greedy"):  # which go by the loss
        assert logged(ours, "learning_rate") == logged(stock, "learning_rate")


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles.

    The compiler reads `grad` of everything, is built on what torch deprecates, and in torch 2.11 says where it leaves a
    piece uncompiled.
    """
    reads, leaves = "The .grad attribute of a Tensor that is not a leaf", "Dynamo does not know how to trace"
    for warning in (f"ignore:{reads}:UserWarning", f"ignore:{leaves}:UserWarning", "ignore::DeprecationWarning"):
        test = pytest.mark.filterwarnings(warning)(test)
    return pytest.mark.usefixtures("compiler")(test)


NEARLY = {"rtol": 1e-4, "atol": 1e-6}
GENTLE = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4}  # Adam makes much of a small difference
MODES = LEARNED | {
    "calibration_strategy": "steps",
    "calibration_interval": 2,
    "calibration_refit": True,
    "alignment_steps": 3,
}


@compiling
def test_a_compiled_model_trains_as_it_does_uncompiled(tmp_path):
    """In all modes of the hooks, twice; after the same class was compiled for backpropagation, and for evaluation.

    What was compiled then knows of no hooks, and torch does not look for any. It would go on with backpropagation.
    """

    def run(kind: type[Trainer] = GrapeTrainer, **options: Any) -> list[dict[str, Any]]:
        options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2} | GENTLE | options
        trainer = make_trainer(PLAIN, tmp_path, kind, more={"eval_dataset": PLAIN.samples(4)}, **options)
        trainer.train()
        found = [weights(trainer), dict(logged(trainer, "loss"))]
        trainer.train()
        compiled = type(trainer.model_wrapped).__name__ == "OptimizedModule"
        assert compiled == ("torch_compile" in options)
        assert count_hooks(trainer.model) == 0
        return [*found, weights(trainer)]

    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    eager, stock, bp = run(**MODES), run(Trainer, **compiled), run(method="bp", **compiled)
    assert_same(bp[0], stock[0])
    assert_same(bp[2], stock[2])
    assert bp[1] == stock[1]
    first, losses, second = run(**MODES, **compiled)
    assert_same(first, eager[0], **NEARLY)
    assert losses == pytest.approx(eager[1], rel=1e-5)
    assert_same(second, eager[2], **NEARLY)
    assert stock[1] != pytest.approx(eager[1], rel=1e-5)


@compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++) on the CPU")
def test_inductor(tmp_path):
    """The default backend, in a mode of its own, drops tangents without a word: estimates must not be compiled."""
    eager = train(PLAIN, tmp_path, **GENTLE, **LEARNED)
    compiled = train(PLAIN, tmp_path, torch_compile=True, torch_compile_mode="default", **GENTLE, **LEARNED)
    assert compiled.args.torch_compile_backend == "inductor"
    assert_same(weights(compiled), weights(eager), **NEARLY)
    assert differ(weights(train(PLAIN, tmp_path, Trainer, **GENTLE)), weights(compiled))


class Counting(PlainLanguageModel):
    """Takes what the Trainer hands on to a model whose signature it cannot read."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None) -> Any:
        return super().forward(input_ids, labels)


class Wrapped(nn.Module):
    """Compiles the model that it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = torch.compile(model, backend="aot_eager")

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.model(input_ids, labels)


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="aot_eager"),
    "in a wrapper": Wrapped,
    "in place": lambda model: model.compile(backend="aot_eager") or model,
}


@compiling
@pytest.mark.parametrize("way", COMPILED)
def test_a_model_that_was_compiled_before(way, tmp_path):
    """It trains as with ``torch_compile``, and what is refused there is refused here."""
    eager = train(PLAIN, tmp_path, **GENTLE, **MODES)
    problem = dataclasses.replace(PLAIN, build=lambda: COMPILED[way](Counting()))
    options = {"remove_unused_columns": False} | GENTLE | MODES
    compiled = train(problem, tmp_path, **options)
    got, wanted = (list(weights(trainer).values()) for trainer in (compiled, eager))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **NEARLY)
    with pytest.raises(ValueError, match="torch.compile with feedback_sweeps or feedback_path='shortcut'"):
        make_trainer(problem, tmp_path, **options, feedback_sweeps=1)
    with pytest.raises(ValueError, match="does not go with a model that was compiled"):
        make_trainer(problem, tmp_path, method="fa")


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_teach_their_maps(backend, tmp_path):
    options = GENTLE | LEARNED | {"feedback_rule": "local"}
    compiled = train(PLAIN, tmp_path, torch_compile=True, torch_compile_backend=backend, **options)
    assert_same(weights(compiled), weights(train(PLAIN, tmp_path, **options)), **NEARLY)


# --- less precise products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jvp_mode", ["finite_difference", "dual"])
def test_estimates_do_not_suffer_from_less_precise_products(jvp_mode, tmp_path):
    """With ``tf32`` or ``torch_compile`` GPUs compute them in TF32; here the CPU is told to take bf16."""
    setting = torch.backends.mkldnn.matmul
    options = LEARNED | {"jvp_mode": jvp_mode, "max_steps": 1}
    exact = train(GPT2, tmp_path, **options).feedback
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        rough = train(GPT2, tmp_path, **options).feedback
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    for a, b in zip(exact, rough, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_precision_is_full_for_a_while(device_type):
    """Of the settings alone: no product is computed."""
    kinds = _products(device_type)
    before = [kind.fp32_precision for kind in kinds]
    torch.backends.fp32_precision = "tf32"  # as transformers does for `tf32`
    try:
        with full_precision(device_type):
            assert {kind.fp32_precision for kind in kinds} == {"ieee"}
        assert {kind.fp32_precision for kind in kinds} == {"tf32"}
        torch.backends.fp32_precision = "ieee"
        assert {kind.fp32_precision for kind in kinds} == {"ieee"}  # nothing was fixed at TF32
    finally:
        torch.backends.fp32_precision = "none"
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


# --- batches that do not fit -----------------------------------------------------------------------------------------


class Cramped(PlainLanguageModel):
    """Has no memory to train on more than four samples, as it finds out in a later step. It has grown by then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.grown = 0, None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += torch.is_grad_enabled() and self.training
        if len(input_ids) > 4 and self.calls > 6:
            self.grown = {name: p.detach().clone() for name, p in self.named_parameters()}
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
        return super().forward(input_ids, labels)


@pytest.mark.parametrize("options", [LEARNED, MODES], ids=["grape", "calibrated"])
def test_auto_find_batch_size_is_a_fresh_run_with_smaller_batches(options, tmp_path):
    """From the weights that it had when memory ran out, as the stock Trainer has it; B_l and schedule begin anew."""
    sizes: list[int] = []
    options = options | {"optim": "sgd", "learning_rate": 0.1, "samples": 20}  # Adam's state would stay
    cramped = make_trainer(
        Problem("cramped", Cramped, PLAIN.draw),
        tmp_path,
        per_device_train_batch_size=5,
        auto_find_batch_size=True,
        **options,
    )
    cramped.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"])) if m.training else None, with_kwargs=True
    )
    cramped.train()
    assert set(sizes) == {5, 4}
    assert cramped.state.train_batch_size == 4

    small = make_trainer(PLAIN, tmp_path, per_device_train_batch_size=4, **options)
    small.model.load_state_dict(cramped.model.grown)
    small.train()
    assert_same(weights(cramped), weights(small))
    for name in ("loss", "grape/calibration/steps", "grape/alignment/estimate/mean", "grape/alignment/exact/mean"):
        at_all = "exact" not in name or "alignment_steps" in options
        assert logged(cramped, name, at_all) == logged(small, name, at_all)


# --- the best model, and the next run --------------------------------------------------------------------------------


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_comes_with_its_feedback(only_model, tmp_path):
    """Without B_l in the checkpoints the last ones stay."""
    found: dict[int, list[Tensor]] = {}
    trainer = make_trainer(
        PLAIN,
        tmp_path,
        more={"eval_dataset": PLAIN.samples(12)},
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_only_model=only_model,
        learning_rate=0.3,
        **EVALUATED,
        **LEARNED,
    )
    trainer.add_callback(OnEvent("step_end", lambda state, **_: found.update({state.global_step: trainer.feedback})))
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 10
    kept = found[10 if only_model else best]
    assert len(trainer.feedback) == len(kept) == 2
    assert all(map(torch.equal, trainer.feedback, kept))
    assert not torch.equal(found[best][0], found[10][0])


def test_a_second_run_begins_with_fresh_feedback(tmp_path):
    """From the weights of the best model of the first. It is what another Trainer would do with that model."""
    saved = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    options = EVALUATED | saved | LEARNED | {"optim": "sgd", "learning_rate": 0.3, "max_steps": 6}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the last is not the best
    trainer, other = (
        make_trainer(PLAIN, tmp_path / name, more={"eval_dataset": PLAIN.samples(12)}, **options) for name in "ab"
    )
    trainer.train()
    assert trainer.state.best_global_step < 6
    other.model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    other.train()
    assert_same(weights(trainer), weights(other))
    assert logged(trainer, "grape/alignment/estimate/mean") == logged(other, "grape/alignment/estimate/mean")


# --- a hyperparameter search -----------------------------------------------------------------------------------------


class PruneTheSecond(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number == 1


@pytest.fixture
def quiet_optuna() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(level)


def search(
    folder: Path, space: dict[str, list[Any]], trials: int, **options: Any
) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return the values of each trial that came to its end, and what it learned."""
    found = []
    trainer = make_trainer(
        GPT2,
        folder,
        more={"model_init": lambda: gpt2(dropout=0.1), "eval_dataset": GPT2.samples(4)},
        **EVALUATED | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | options,
    )
    models = []
    trainer.add_callback(OnEvent("train_begin", lambda state, model, **_: models.append(model)))

    def note(state: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step == 4:  # else it was pruned
            found.append(({name: getattr(trainer.args, name) for name in space}, weights(trainer)))

    trainer.add_callback(OnEvent("train_end", note))
    trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        n_trials=trials,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(space, seed=0),
        pruner=PruneTheSecond(),
    )
    assert len({id(model) for model in models}) == len(models) == trials
    assert [count_hooks(model) for model in models] == [0] * trials
    return found


@pytest.mark.usefixtures("quiet_optuna")
def test_every_trial_of_a_search_is_a_run_of_its_own(tmp_path):
    """A trial that was pruned half-way is followed by one that knows nothing of it."""
    space = {"learning_rate": [1e-2, 3e-2], "feedback_lr": [0.05, 0.3]}
    found = search(tmp_path / "search", space, 3, **LEARNED)
    assert len(found) == 2
    assert found[0][0] != found[1][0]
    more = {"model_init": lambda: gpt2(dropout=0.1), "eval_dataset": GPT2.samples(4)}
    for values, learned in found:
        alone = train(GPT2, tmp_path / "alone", more=more, **EVALUATED | LEARNED | {"max_steps": 4} | values)
        assert_same(learned, weights(alone))


@pytest.mark.usefixtures("quiet_optuna")
def test_a_search_over_methods_and_presets(tmp_path):
    options = {"model_init": lambda: gpt2(dropout=0.1), "eval_dataset": GPT2.samples(4)}
    (values, learned), *others = search(tmp_path / "methods", {"method": ["grape", "bp"]}, 2, **LEARNED)
    assert not others
    run = train(GPT2, tmp_path, more=options, **EVALUATED | LEARNED | {"max_steps": 4} | values)
    assert_same(learned, weights(run))
    # What a method or a preset implies, and what auto chooses, is filled in for each trial.
    for name, value in (("grape_preset", "paper"), ("method", "dkp"), ("method", "dfa"), ("method", "fa")):
        ((values, learned),) = search(tmp_path / "one", {name: [value]}, 1)
        assert values == {name: value}
        run = train(GPT2, tmp_path, more=options, **EVALUATED | {"max_steps": 4} | values)
        assert_same(learned, weights(run))
    with pytest.raises(ValueError, match="calibration_interval"):
        search(tmp_path / "refused", {"calibration_interval": [-1.0]}, 1)


# --- fused kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(is_liger_kernel_available(), reason="about what happens without the package liger-kernel")
def test_liger_without_its_package_is_the_stock_trainers_error(tmp_path):
    with pytest.raises(ImportError) as stock:
        train(PADDED, tmp_path, Trainer, use_liger_kernel=True)
    with pytest.raises(ImportError) as ours:
        train(PADDED, tmp_path, use_liger_kernel=True, **LEARNED)
    assert str(ours.value) == str(stock.value)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_liger_kernel_available()),
    reason="liger's kernels are for GPUs, and need the package liger-kernel",
)
def test_liger(tmp_path):
    """They have no forward-mode derivative, and compute the loss without calling the head."""
    options = LEARNED | GENTLE | {"use_cpu": False, "liger_kernel_config": {"rope": True, "rms_norm": True}}
    options |= {"jvp_mode": "auto", "feedback_space": "hidden"}
    fused = train(PADDED, tmp_path, use_liger_kernel=True, **options)
    assert fused._run.jvp_mode == "finite_difference"
    assert_same(weights(fused), weights(train(PADDED, tmp_path, **options)), rtol=1e-2, atol=1e-3)
