"""GrapeTrainer as a Trainer.

First half, with an oracle: the stock Trainer, or the same training split otherwise, bit for bit or in float64. Second
half: what users hang on a Trainer goes on working.
"""

import dataclasses
import pickle
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import GradientState
from helpers import (
    LEARNED,
    OnEvent,
    arguments,
    assert_same,
    count_hooks,
    differ,
    logged,
    make_trainer,
    train,
    weights,
)
from problems import DROPOUT, GPT2, NOISY, PADDED, PLAIN, PROBLEMS, TUPLES, Problem, gpt2, transformer
from torch import Tensor, nn
from transformers import EvalPrediction, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from grape_hf import GrapeArgumentsMixin, GrapeMixin, GrapeTrainer

EXACT = dict(optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=0)
# transformers 5.23 calls activation checkpointing by its name, 5.17 does not know that name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in dataclasses.fields(TrainingArguments)}
)


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.id)
def problem(request) -> Problem:
    return request.param


# --- the stock Trainer, bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 3}, id="accumulation"),
        pytest.param({"bf16": True}, id="bf16"),
    ],
)
def test_bp_is_the_stock_trainer(options, tmp_path):
    options = options | {"max_steps": 20}
    stock = train(DROPOUT, tmp_path, Trainer, **options)
    ours = train(DROPOUT, tmp_path, method="bp", **options)
    assert_same(weights(ours), weights(stock))
    assert logged(ours, "loss") == logged(stock, "loss")
    assert logged(ours, "grad_norm") == logged(stock, "grad_norm")


def test_bp_is_the_stock_trainer_on(problem, tmp_path):
    assert_same(weights(train(problem, tmp_path, method="bp")), weights(train(problem, tmp_path, Trainer)))


def test_grape_is_not_bp(problem, tmp_path):
    """Else every comparison with the stock Trainer would be one with itself."""
    learned = weights(train(problem, tmp_path, **LEARNED))
    assert differ(weights(train(problem, tmp_path, Trainer)), learned)


class Watched(Trainer):
    """Notes what the model is fed and which dropout masks it draws in the stock training step."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = getattr(self, "seen", [])
        dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        handles = [d.register_forward_hook(lambda m, x, y: self.seen.append(y == 0)) for d in dropouts]
        handles.append(
            model.register_forward_pre_hook(
                lambda m, args, kwargs: self.seen.append(kwargs["labels"].clone()), with_kwargs=True
            )
        )
        loss = super().training_step(model, *args, **kwargs)
        for handle in handles:
            handle.remove()
        return loss


class WatchedGrape(GrapeMixin, Watched):
    pass


@pytest.mark.parametrize("problem", [DROPOUT, NOISY], ids=lambda problem: problem.id)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dfa", "feedback_init": "auto"}, id="dfa"),
        pytest.param(LEARNED, id="grape"),
        pytest.param(LEARNED | {"jvp_mode": "finite_difference"}, id="grape-finite-differences"),
        pytest.param(
            LEARNED | {"calibration_strategy": "steps", "calibration_interval": 3, "alignment_steps": 2},
            id="grape-calibrated-measured",
        ),
    ],
)
def test_data_order_and_dropout_masks_are_those_of_bp(problem, options, tmp_path):
    def watch(kind: type[Trainer], args: TrainingArguments) -> list[Tensor]:
        trainer = kind(problem.model(), args, train_dataset=problem.samples(32))
        trainer.train()
        return trainer.seen

    ours = watch(WatchedGrape, arguments(tmp_path, gradient_accumulation_steps=2, **options))
    stock = watch(Watched, arguments(tmp_path, TrainingArguments, gradient_accumulation_steps=2))
    assert len(ours) == len(stock) > 20  # what the first look saw is taken off the list again
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
@pytest.mark.parametrize("problem", [DROPOUT, NOISY], ids=lambda problem: problem.id)
def test_estimates_and_measurements_leave_no_trace(problem, mode, tmp_path):
    """At rate zero GrAPE is DFA, down to the running statistics of the batch norms."""
    frozen = train(problem, tmp_path, method="dfa", feedback_init="auto")
    idle = LEARNED | {"feedback_lr": 0.0, "alignment_steps": 2, "jvp_mode": mode}
    measured = train(problem, tmp_path, **idle)
    assert len(logged(measured, "grape/alignment/estimate/mean")) == 10
    assert len(logged(measured, "grape/alignment/exact/mean")) == 5
    assert_same(weights(measured), weights(frozen))
    buffers = dict(frozen.model.named_buffers())
    assert bool(buffers) == (problem is NOISY)
    if buffers:
        assert_same(dict(measured.model.named_buffers()), buffers)
    assert logged(measured, "loss") == logged(frozen, "loss")


# --- the same training, done otherwise -------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [GPT2, PADDED], ids=lambda problem: problem.id)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dfa", "feedback_init": "auto"}, id="dfa"),
        pytest.param(LEARNED, id="grape"),
        pytest.param(LEARNED | {"jvp_fraction": 0.25, "jvp_steps": 2}, id="quarter-every-2"),
        pytest.param(
            LEARNED | {"calibration_strategy": "steps", "calibration_interval": 3, "calibration_refit": True},
            id="calibration-refit",
        ),
        pytest.param(
            LEARNED | {"calibration_strategy": "adaptive", "calibration_threshold": 1.0, "calibration_cooldown": 3},
            id="adaptive",
        ),
    ],
)
def test_four_micro_batches_of_4_are_a_batch_of_16(problem, options, tmp_path):
    """40 samples: the last step of an epoch has 8. An estimate by one half of them would differ."""
    run = dict(dtype=torch.float64, samples=40, max_steps=8, alignment_steps=3, **options)
    whole = train(problem, tmp_path, per_device_train_batch_size=16, **run)
    split = train(problem, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, **run)
    assert_same(weights(split), weights(whole), rtol=1e-7, atol=1e-9)
    for name in ("grape/calibration/steps", "grape/alignment/exact/mean", "grape/alignment/estimate/h_1"):
        at_all = "estimate" not in name or options["method"] == "grape"
        assert dict(logged(split, name, at_all)) == pytest.approx(dict(logged(whole, name, at_all)), rel=1e-5)
    estimated = logged(split, "grape/alignment/estimate/mean", at_all=False)
    assert bool(estimated) == (options["method"] == "grape")
    if "calibration_strategy" in options:
        assert 0 < logged(split, "grape/calibration/steps")[-1][1] < 8


def test_padding_has_no_say(tmp_path):
    """Other tokens under the padding: nothing that is learned changes, B_l neither."""

    def other(sample: dict[str, Tensor]) -> dict[str, Tensor]:
        return sample | {"input_ids": sample["input_ids"].where(sample["attention_mask"] == 1, 7)}

    options = LEARNED | {"alignment_steps": 2, "calibration_strategy": "steps", "calibration_interval": 4}
    trainer = train(PADDED, tmp_path, dtype=torch.float64, **options)
    data = [other(sample) for sample in PADDED.samples(32)]
    again = train(PADDED, tmp_path, dtype=torch.float64, more={"train_dataset": data}, **options)
    assert_same(weights(again), weights(trainer), rtol=1e-7, atol=1e-9)
    name = "grape/alignment/exact/mean"
    assert dict(logged(again, name)) == pytest.approx(dict(logged(trainer, name)), rel=1e-5)


def test_estimates_are_made_without_dropout(tmp_path):
    noisy, quiet = (train(problem, tmp_path, max_steps=1, **LEARNED) for problem in (DROPOUT, GPT2))
    assert_same(
        {name: b for name, b in weights(noisy).items() if name.startswith("B_")},
        {name: b for name, b in weights(quiet).items() if name.startswith("B_")},
    )


@pytest.mark.parametrize("problem", [DROPOUT, PADDED, TUPLES], ids=lambda problem: problem.id)
def test_activation_checkpointing_equals_none(problem, tmp_path):
    options = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 3}
    plain = train(problem, tmp_path, **options)
    again = train(problem, tmp_path, **options, **{CHECKPOINTING: True})
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.model.modules())
    assert_same(weights(again), weights(plain), rtol=1e-6, atol=1e-7)


# --- what is exact in a star: the loss, e, the last block and the head -----------------------------------------------


UNTIED = Problem("gpt2-untied", lambda: transformer("gpt2", tie_word_embeddings=False), GPT2.draw)


def shifted_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch + 0.1 * (
        logits.square().mean()
    )


@pytest.mark.parametrize(
    ("options", "more"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"label_smoothing_factor": 0.3}, {}, id="label-smoothing"),
        pytest.param({}, {"compute_loss_func": shifted_loss}, id="compute_loss_func"),
        pytest.param({"gradient_accumulation_steps": 2}, {}, id="accumulation"),
        pytest.param({"gradient_accumulation_steps": 2}, {"compute_loss_func": shifted_loss}, id="both"),
        pytest.param({"neftune_noise_alpha": 5.0}, {}, id="neftune"),
    ],
)
def test_loss_and_exact_gradients_are_the_stock_trainers(options, more, tmp_path):
    """After one step of SGD the last block and the head stand where backpropagation puts them, the others do not."""
    stock = train(UNTIED, tmp_path, Trainer, more=more, **EXACT, **options)
    ours = train(UNTIED, tmp_path, more=more, **EXACT, **options, **LEARNED)
    assert logged(ours, "loss") == logged(stock, "loss")
    got, expected = weights(ours), weights(stock)
    exact = {name for name in expected if name.startswith(("transformer.h.2", "transformer.ln_f", "lm_head"))}
    assert_same({n: got[n] for n in exact}, {n: expected[n] for n in exact}, rtol=1e-6, atol=1e-8)
    assert {n for n in expected if "weight" in n} - exact <= differ(expected, got)


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_a_loss_of_the_users_changes_what_is_learned(option, tmp_path):
    """That the two above agree would mean little if neither heard of the loss."""
    options = {"label_smoothing_factor": 0.3} if option == "label_smoothing_factor" else {}
    more = {"compute_loss_func": shifted_loss} if option == "compute_loss_func" else {}
    assert differ(
        weights(train(UNTIED, tmp_path, more=more, **EXACT, **options, **LEARNED)),
        weights(train(UNTIED, tmp_path, **EXACT, **LEARNED)),
    )


def test_max_grad_norm_bounds_the_step(tmp_path):
    before = weights(make_trainer(GPT2, tmp_path, method="bp"))
    trainer = train(GPT2, tmp_path, **(EXACT | {"max_grad_norm": 0.01}), **LEARNED)
    step = torch.cat([(p - before[name]).flatten() for name, p in trainer.model.named_parameters()])
    assert step.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert logged(trainer, "grad_norm")[0][1] > 0.01  # of the gradient that was clipped


# --- what users hang on a Trainer ------------------------------------------------------------------------------------


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    guesses = prediction.predictions[:, :-1].argmax(-1)
    return {"accuracy": float((guesses == prediction.label_ids[:, 1:]).mean())}


def test_evaluation_on_the_way_is_the_stock_trainers_and_changes_nothing(tmp_path):
    more = {"eval_dataset": GPT2.samples(12), "compute_metrics": accuracy}
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    watched = train(GPT2, tmp_path, more=more, **options, **LEARNED)
    assert_same(weights(watched), weights(train(GPT2, tmp_path, **LEARNED)))

    last = watched.evaluate()
    assert logged(watched, "eval_accuracy")[-1][1] == last["eval_accuracy"]
    assert len(logged(watched, "eval_loss")) == 7  # at the start, 5 on the way, the one just now
    stock = Trainer(watched.model, arguments(tmp_path, TrainingArguments), **more)
    assert {k: v for k, v in stock.evaluate().items() if "loss" in k or "accuracy" in k} == {
        k: v for k, v in last.items() if "loss" in k or "accuracy" in k
    }
    ours, theirs = (t.predict(GPT2.samples(12)) for t in (watched, stock))
    np.testing.assert_array_equal(ours.predictions, theirs.predictions)
    assert ours.metrics["test_accuracy"] == theirs.metrics["test_accuracy"]


def test_an_evaluation_leaves_the_next_estimate_as_it_was(tmp_path):
    """The model comes back from an evaluation in eval mode, and batch norms have two ways to normalise."""
    problem = Problem("batch-norm", lambda: without_dropout(NOISY.build()), NOISY.draw)
    options = LEARNED | {"alignment_steps": 1}
    plain = train(problem, tmp_path, **options)
    more = {"eval_dataset": problem.samples(4)}
    evaluated = train(problem, tmp_path, more=more, eval_strategy="steps", eval_steps=1, **options)
    assert_same(weights(evaluated), weights(plain))
    assert logged(evaluated, "grape/alignment/exact/mean") == logged(plain, "grape/alignment/exact/mean")


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    found = {}

    def note(state, model, **_: Any) -> None:
        found[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    trainer = make_trainer(
        PLAIN,
        tmp_path,
        more={"eval_dataset": PLAIN.samples(12), "callbacks": [OnEvent("step_end", note)]},
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        learning_rate=0.3,
        **LEARNED,
    )
    trainer.train()
    losses = {step: loss for step, loss in logged(trainer, "eval_loss")}
    best = min(losses, key=lambda step: losses[step])
    assert trainer.state.best_global_step == best < 10
    assert_same(dict(trainer.model.named_parameters()), found[best])
    assert count_hooks(trainer.model) == 0


def test_callbacks_hear_what_they_hear_from_the_stock_trainer(tmp_path):
    events = ["train_begin", "epoch_begin", "step_begin", "substep_end", "pre_optimizer_step", "optimizer_step"]
    events += ["step_end", "evaluate", "save", "log", "epoch_end", "train_end", "prediction_step"]

    def hear(kind: type[Trainer], **options: Any) -> list[tuple[str, int]]:
        heard: list[tuple[str, int]] = []
        callbacks = [OnEvent(e, lambda state, e=e, **_: heard.append((e, state.global_step))) for e in events]
        more = {"callbacks": callbacks, "eval_dataset": GPT2.samples(4)}
        options |= dict(gradient_accumulation_steps=2, eval_strategy="epoch", save_strategy="epoch")
        train(GPT2, tmp_path, kind, more=more, **options)
        return heard

    ours = hear(GrapeTrainer, **LEARNED)
    assert set(events) == {event for event, _ in ours}
    assert ours == hear(Trainer)


def test_a_callback_can_stop_the_training(tmp_path):
    def stop(state, control=None, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3

    class Stop(OnEvent):
        def __init__(self) -> None:
            self.on_step_end = lambda args, state, control, **_: stop(state, control)

    trainer = train(GPT2, tmp_path, more={"callbacks": [Stop()]}, **LEARNED)
    assert trainer.state.global_step == 3
    assert count_hooks(trainer.model) == 0


def test_model_init_starts_everything_afresh(tmp_path):
    """Two runs of one Trainer are the same run: the model is made again, and so is the feedback."""
    trainer = make_trainer(GPT2, tmp_path, more={"model_init": lambda: gpt2(dropout=0.1)}, **LEARNED)
    trainer.train()
    first, model = weights(trainer), trainer.model
    trainer.train()
    assert trainer.model is not model
    assert count_hooks(model) == 0
    assert_same(weights(trainer), first)


def test_auto_find_batch_size_starts_again_with_less(tmp_path):
    class Small(type(PLAIN.build())):
        calls = 0

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            self.calls += torch.is_grad_enabled()
            if len(input_ids) > 4 and self.calls > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(input_ids, labels)

    hooks = []
    trainer = train(
        Problem("small", Small, PLAIN.draw),
        tmp_path,
        per_device_train_batch_size=6,
        auto_find_batch_size=True,
        more={"callbacks": [OnEvent("step_end", lambda state, model, **_: hooks.append(count_hooks(model)))]},
        **LEARNED,
    )
    assert trainer._train_batch_size <= 4
    assert trainer.state.global_step == 10
    assert len(set(hooks)) == 1  # h_1, h_2, y and the calls, after the new start as well
    assert hooks[0] > 3
    assert len(logged(trainer, "grape/alignment/estimate/mean")) == 10


def test_logs(tmp_path):
    trainer = train(GPT2, tmp_path, alignment_steps=4, logging_steps=2, **(LEARNED | {"jvp_steps": 3}))
    # Logged after steps 2, 4, ..: estimates were made in steps 0, 3, 6, 9, and stand until the next; the exact
    # alignment was measured in 0, 4, 8.
    for kind, at in {"estimate": [2, 4, 6, 8, 10], "exact": [2, 6, 10]}.items():
        for name in ("mean", "h_1", "h_2"):
            entries = logged(trainer, f"grape/alignment/{kind}/{name}")
            assert [step for step, _ in entries] == at
            assert all(-1 <= value <= 1 for _, value in entries)
    for entry in trainer.state.log_history[:-1]:
        for kind in ("estimate", "exact"):
            if f"grape/alignment/{kind}/mean" in entry:
                h = [entry[f"grape/alignment/{kind}/h_{i}"] for i in (1, 2)]
                assert entry[f"grape/alignment/{kind}/mean"] == pytest.approx(sum(h) / 2, rel=1e-5)
    estimates = dict(logged(trainer, "grape/alignment/estimate/mean"))
    assert estimates[4] == estimates[6]
    assert len(set(estimates.values())) == 4


# --- mixins and arguments --------------------------------------------------------------------------------------------


class Penalised(Trainer):
    """A user's own Trainer, with a loss and a step of its own."""

    def __init__(self, *args: Any, penalty: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalty, self.steps = penalty, 0

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.penalty * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.steps += 1
        return super().training_step(*args, **kwargs)


class PenalisedGrape(GrapeMixin, Penalised):
    pass


def test_the_mixin_serves_a_users_trainer(tmp_path):
    def run(kind: type[Trainer], penalty: float, **options: Any) -> Trainer:
        trainer = kind(
            model=UNTIED.model(),
            args=arguments(tmp_path, **EXACT, **options),
            train_dataset=UNTIED.samples(32),
            penalty=penalty,
        )
        trainer.train()
        assert trainer.steps == 1
        return trainer

    stock, ours, free = run(Penalised, 1.0), run(PenalisedGrape, 1.0, **LEARNED), run(PenalisedGrape, 0.0, **LEARNED)
    assert_same(weights(run(PenalisedGrape, 1.0, method="bp")), weights(stock))
    torch.testing.assert_close(ours.model.lm_head.weight, stock.model.lm_head.weight)
    assert not torch.allclose(ours.model.lm_head.weight, free.model.lm_head.weight)
    assert not torch.allclose(ours.model.transformer.h[0].mlp.c_fc.weight, stock.model.transformer.h[0].mlp.c_fc.weight)


class Halves(GrapeTrainer):
    """Cuts a batch by itself, and hands every part to the step of the class that it is derived from."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        parts = ({name: value[half] for name, value in inputs.items()} for half in (slice(0, 2), slice(2, None)))
        losses = [super(Halves, self).training_step(model, part, *args, **kwargs) for part in parts]
        for p in model.parameters():
            p.grad /= 2
        return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feedback_sweeps": 1},
        {"calibration_strategy": "steps", "calibration_interval": 2, "calibration_refit": True, "method": "dfa"},
    ],
    ids=str,
)
def test_a_step_that_calls_ours_for_each_part_of_a_batch_is_one_of_accumulation(options, tmp_path):
    """B_l learned from the first part twice, and the second part got another B_l than the first."""
    parted = train(PLAIN, tmp_path, Halves, dtype=torch.float64, max_steps=5, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = train(PLAIN, tmp_path, dtype=torch.float64, max_steps=5, **options)
    assert_same(weights(parted), weights(whole), rtol=1e-9, atol=1e-12)
    assert logged(parted, "grape/calibration/steps") == logged(whole, "grape/calibration/steps")


class Whole(Trainer):
    """A user's step from the first line to the last, as adversarial training and old scripts have it."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class WholeGrape(GrapeMixin, Whole):
    pass


class Swapped(GrapeTrainer):
    """The same with the name of its base exchanged: direct feedback has no part in it."""

    training_step = Whole.training_step


def test_a_step_that_leaves_out_ours_is_refused_before_an_update(tmp_path):
    def run(kind: type[Trainer], **options: Any) -> Trainer:
        args = arguments(tmp_path, **EXACT, gradient_accumulation_steps=2, **options)
        trainer = kind(UNTIED.model(), args, train_dataset=UNTIED.samples(32))
        trainer.train()
        return trainer

    refused = Swapped(UNTIED.model(), arguments(tmp_path, **EXACT, **LEARNED), train_dataset=UNTIED.samples(8))
    before = weights(refused)
    with pytest.raises(RuntimeError, match=r"Swapped computed gradients by ordinary backpropagation"):
        refused.train()
    assert_same(weights(refused), before)
    stock = weights(run(Whole))
    assert_same(weights(run(Swapped, method="bp")), stock)
    assert_same(weights(run(WholeGrape, method="bp")), stock)
    direct = run(WholeGrape, **LEARNED)
    assert differ({name: p for name, p in weights(direct).items() if name in stock}, stock)
    assert direct.feedback

    again = run(GrapeTrainer, **LEARNED)
    again.training_step = MethodType(Whole.training_step, again)
    with pytest.raises(RuntimeError, match="ordinary backpropagation"):
        again.train()


class OwnLoop(GrapeTrainer):
    """A ``train`` of its own, which tells its callbacks of steps that are over, and of nothing else (trl's PPO)."""

    def train(self, *args: Any, **kwargs: Any) -> None:
        self.create_optimizer()
        for batch in self.get_train_dataloader():
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.callback_handler.on_step_end(self.args, self.state, self.control)


def test_a_loop_that_takes_no_step_of_ours_is_refused(tmp_path):
    def trainer(**options: Any) -> Trainer:
        return OwnLoop(UNTIED.model(), arguments(tmp_path, **options), train_dataset=UNTIED.samples(8))

    with pytest.raises(RuntimeError, match="a loop of its own"):
        trainer().train()
    trainer(method="bp").train()


def test_a_search_may_leave_bp(tmp_path):
    """Each training asks for itself: the method of a run is not that of the one before."""
    trainer = Swapped(UNTIED.model(), arguments(tmp_path, **EXACT, method="bp"), train_dataset=UNTIED.samples(8))
    trainer.train()
    trainer.args.method = "dfa"
    with pytest.raises(RuntimeError, match="ordinary backpropagation"):
        trainer.train()


def test_the_stock_classes_must_not_come_first():
    with pytest.raises(TypeError, match=r"expected GrapeMixin before it, as in class Wrong\(GrapeMixin"):
        type("Wrong", (Watched, GrapeMixin), {})
    with pytest.raises(TypeError, match=r"expected GrapeArgumentsMixin before TrainingArguments"):
        type("Wrong", (Seq2SeqTrainingArguments, GrapeArgumentsMixin), {})


def test_plain_arguments_mean_the_defaults(tmp_path):
    def run(args: TrainingArguments) -> dict[str, Tensor]:
        trainer = GrapeTrainer(GPT2.model(), args, train_dataset=GPT2.samples(32))
        trainer.train()
        return weights(trainer)

    plain, ours = arguments(tmp_path, TrainingArguments), arguments(tmp_path)
    assert type(plain) is TrainingArguments
    assert_same(run(plain), run(ours))


@dataclasses.dataclass
class SequenceArguments(GrapeArgumentsMixin, Seq2SeqTrainingArguments):
    pass


def test_the_options_mix_with_other_arguments(tmp_path):
    args = arguments(tmp_path, SequenceArguments, predict_with_generate=True, **LEARNED)
    trainer = GrapeTrainer(GPT2.model(), args, train_dataset=GPT2.samples(32))
    trainer.train()
    assert args.predict_with_generate
    assert_same(weights(trainer), weights(train(GPT2, tmp_path, **LEARNED)))
    # As trl does: SFTConfig(**args.to_dict()).
    again = SequenceArguments(**args.to_dict())
    names = [f.name for f in dataclasses.fields(GrapeArgumentsMixin)]
    assert {name: getattr(again, name) for name in names} == {name: getattr(args, name) for name in names}


def test_batch_norms_get_the_whole_batch(tmp_path):
    """A quarter of a batch of 4 is a single sample, of which a batch norm has no statistics."""
    trainer = train(NOISY, tmp_path, jvp_steps=1, jvp_fraction=0.25)
    assert_same(weights(trainer), weights(train(NOISY, tmp_path, jvp_steps=1, jvp_fraction=1.0)))
    assert logged(trainer, "grape/alignment/estimate/mean")


def test_a_trainer_may_be_pickled(tmp_path):
    """As the stock Trainer may: searches on clusters send it to workers."""
    trainer = make_trainer(PLAIN, tmp_path, max_steps=1)
    GradientState().dataloader_references = [
        None
    ]  # another test's training left weak references, which cannot be pickled
    again = pickle.loads(pickle.dumps(trainer))
    again.train()
    trainer.train()
    assert_same(weights(again), weights(trainer))


def test_the_number_of_stages_is_that_of_the_trainers_making(tmp_path):
    trainer = make_trainer(PLAIN, tmp_path)
    trainer.args.pipeline_stages = 2
    with pytest.raises(ValueError, match="pipeline_stages=2 came when the Trainer had been made"):
        trainer.train()


def test_what_is_set_before_train_is_checked_as_at_the_making(tmp_path):
    trainer = make_trainer(PLAIN, tmp_path, method="bp", torch_compile=True)
    trainer.args.method = "fa"
    with pytest.raises(ValueError, match="does not go with torch_compile"):
        trainer.train()


def test_a_step_that_was_taken_by_hand_leaves_no_hooks_behind_the_next_training(tmp_path):
    trainer = make_trainer(PLAIN, tmp_path, max_steps=1)
    before = count_hooks(trainer.model)
    trainer.train()
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    trainer.train()
    assert count_hooks(trainer.model) == before
