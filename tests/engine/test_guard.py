"""What is not finite stays out of the feedback, and feedback that drifted away is left.

Oracles: a run that made no estimate where this one's was spoilt; backpropagation; the unpadded batch. All bit for bit,
unless a tolerance says why not.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, OnEvent, arguments, assert_same, count_hooks, differ, logged, make_trainer, train, weights
from problems import GPT2, LINEAR, MLP, PADDED, PLAIN, WIDTH, PlainLanguageModel, Problem, transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer

from grape_hf import GrapeArgumentsMixin, GrapeTrainer
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import Feedback
from grape_hf.core.finite import FiniteGuard
from grape_hf.core.jacobian import JacobianSum
from grape_hf.engine.drift import DriftGuard
from grape_hf.engine.run import GrapeRun

NAN, INF = float("nan"), float("inf")
RULES = {
    "lms": LEARNED | {"feedback_rule": "lms"},
    "ema": LEARNED | {"feedback_rule": "ema"},
    "cosine": LEARNED | {"feedback_rule": "cosine", "feedback_normalize": True},
}
every_rule = pytest.mark.parametrize("options", RULES.values(), ids=RULES)


# --- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_number_keeps_all_matrices_as_they_were(bad):
    guard = FiniteGuard()
    old, new = torch.randn(2, 3, 4, 5)
    assert_equal(guard.admit(old, new), new)
    spoilt = new.clone()
    spoilt[2, 3, 4] = bad
    for _ in range(2):
        assert_equal(guard.admit(old, spoilt), old)
    assert guard.counts.tolist() == [2, 2, 2]
    guard.admit(old, new)
    guard.admit(old, spoilt)
    assert guard.counts.tolist() == [3, 1, 2]  # all, in a row, most in a row


def assert_equal(got: Any, expected: Any) -> None:
    assert len(expected), "nothing to compare"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Overflowing(PlainLanguageModel):
    """Between the boundaries activations overflow, in eval mode: in the estimates alone."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_hook(lambda block, args, h: h if block.training else h * self.factor)


OVERFLOWING = Problem("overflowing", Overflowing, PLAIN.draw)


def overflow(trainer: Trainer, factor: float, when: Callable[[int], bool]) -> Trainer:
    def set_factor(state: Any, **_: Any) -> None:
        trainer.model.factor = factor if when(state.global_step) else 1.0

    trainer.add_callback(OnEvent("step_begin", set_factor))
    return trainer


@pytest.mark.parametrize("factor", [NAN, INF])
@every_rule
def test_a_run_with_spoilt_estimates_is_one_without_them(options, factor, tmp_path, caplog):
    run = make_trainer(OVERFLOWING, tmp_path, max_steps=20, **options)
    overflow(run, factor, lambda step: step % 4 != 0).train()
    rarely = train(OVERFLOWING, tmp_path, max_steps=20, **options | {"jvp_steps": 4})
    assert_same(weights(run), weights(rarely))
    assert [skipped for _, skipped in logged(run, "grape/feedback/skipped")] == [n - (n + 3) // 4 for n in range(1, 21)]
    assert logged(run, "grape/feedback/skipped_in_a_row")[-1] == (20, 3)
    assert caplog.text.count("GrAPE: NaN or Inf") == 1
    assert logged(rarely, "grape/feedback/skipped")[-1] == (20, 0)


def test_too_many_in_a_row_stop_the_run(tmp_path):
    options = LEARNED | {"max_skipped_refinements": 5, "logging_steps": 3}
    sick = overflow(make_trainer(OVERFLOWING, tmp_path, **options), NAN, lambda step: True)
    with pytest.raises(FloatingPointError, match=r"in a row.*max_skipped_refinements=5.*lower learning_rate.*bf16"):
        sick.train()
    assert sick.state.global_step == 6  # the first time that the loss is logged, and the count looked at, after five
    assert count_hooks(sick.model) == 1  # its own
    assert_equal(sick.feedback, [torch.eye(WIDTH)] * 2)


@pytest.mark.parametrize(("limit", "spoilt"), [(0, lambda step: True), (6, lambda step: step % 6 != 0)])
def test_fewer_do_not(limit, spoilt, tmp_path):
    options = LEARNED | {"max_skipped_refinements": limit}
    run = overflow(make_trainer(OVERFLOWING, tmp_path, max_steps=14, **options), NAN, spoilt)
    run.train()
    assert run.state.global_step == 14


def test_whoever_resumes_gets_another_chance(tmp_path):
    options = LEARNED | {"save_strategy": "steps", "save_steps": 4, "max_skipped_refinements": 5}
    with pytest.raises(FloatingPointError):
        overflow(make_trainer(OVERFLOWING, tmp_path, **options), NAN, lambda step: True).train()
    well = train(OVERFLOWING, tmp_path, resume=True, **options)
    assert logged(well, "grape/feedback/skipped")[-1] == (10, 4)
    sick = overflow(make_trainer(OVERFLOWING, tmp_path, **options), NAN, lambda step: True)
    with pytest.raises(FloatingPointError):  # four before the save and one more
        sick.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert sick.state.global_step == 5


class NoSync(TorchDispatchMode):
    """Raise where a tensor's value is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


class Watched(GrapeTrainer):
    def _new_engine(self) -> Any:
        engine = super()._new_engine()
        run = engine.run
        finish, run.watched = run.finish_step, 0

        def finish_step(*args: Any, **kwargs: Any) -> None:
            with NoSync():
                finish(*args, **kwargs)
            run.watched += 1

        run.finish_step = finish_step
        return engine


REFITTED = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 3, "calibration_refit": True}


def test_nobody_waits_for_the_device(tmp_path):
    assert train(GPT2, tmp_path, Watched, **REFITTED)._run.watched == 10
    with pytest.raises(AssertionError, match="the host waits"):
        train(GPT2, tmp_path, Watched, **REFITTED | {"calibration_strategy": "adaptive"})


def test_steps_whose_loss_scaler_overflows(tmp_path):
    """In float16, with a real scaler: e or delta overflows, and neither the weights nor B_l take that step."""
    options = {"calibration_strategy": "steps", "calibration_interval": 1, "calibration_refit": True}
    model, samples = MLP.model(), MLP.samples(4)
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)  # beyond float16 until halved a few times
    run = GrapeRun(model, GrapeArgumentsMixin(**options))
    run.start(lambda: model(**batch))
    overflows, skipped = [], []
    for step in range(12):
        weights_before, B_before = [p.detach().clone() for p in model.parameters()], run.feedback.B
        run.begin_step(step)
        with run.step():
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch)["loss"]
            scaler.scale(loss).backward()
        run.finish_step()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        overflows.append(scaler.get_scale() < scale)
        skipped.append(all(map(torch.equal, B_before, run.feedback.B)))
        optimizer.zero_grad()
        assert all(map(torch.equal, weights_before, model.parameters())) == overflows[-1]
    run.close()
    # At the edge e and delta fit into float16, and a weight's gradient does not: B_l may learn from what is finite.
    assert sum(overflows) - 1 <= sum(skipped) <= sum(overflows)
    assert 2 < sum(skipped) < 10
    assert run.read_metrics()["feedback/skipped"] == sum(skipped)
    assert all(torch.isfinite(B).all() for B in run.feedback.B)


# --- nothing to learn from -------------------------------------------------------------------------------------------


@every_rule
def test_an_activation_of_zeros_says_nothing_about_its_jacobian(options, tmp_path):
    """h_1 is zero, so its tangent is, and B_1 stays; B_2 learns."""
    trainer = make_trainer(LINEAR, tmp_path, max_steps=3, learning_rate=0.0, feedback_init="identity", **options)
    nn.init.zeros_(trainer.model.blocks[0].map.weight)
    nn.init.zeros_(trainer.model.blocks[0].map.bias)
    trainer.train()
    torch.testing.assert_close(trainer.feedback[0], torch.eye(WIDTH), rtol=0, atol=1e-7)  # columns are normalised
    assert torch.isfinite(trainer.feedback[1]).all()
    assert (trainer.feedback[1] - torch.eye(WIDTH)).abs().max() > 1e-3
    assert logged(trainer, "grape/feedback/skipped")[-1] == (3, 0)


@every_rule
def test_an_estimate_from_nothing_changes_nothing(options):
    feedback = Feedback([torch.eye(4), torch.eye(4)], options["feedback_rule"], lr=0.1)
    none = torch.zeros((), dtype=torch.int64)
    feedback.refine(JacobianSum([torch.zeros(4, 4)] * 2, [none] * 2))
    assert_equal(feedback.B, [torch.eye(4)] * 2)


def padding_only(problem: Problem, number: int) -> list[dict[str, Tensor]]:
    sample = problem.samples(1)[0]
    nothing = {
        "input_ids": torch.zeros_like(sample["input_ids"]),
        "labels": torch.full_like(sample["labels"], -100),
        "attention_mask": torch.zeros_like(sample["attention_mask"]),
    }
    return [nothing] * number


@pytest.mark.parametrize("jvp_mode", ["dual", "finite_difference"])
@every_rule
def test_a_micro_batch_of_padding_only_has_no_say(options, jvp_mode, tmp_path):
    options = options | {"jvp_mode": jvp_mode, "max_steps": 3, "train_sampling_strategy": "sequential"}
    samples = PADDED.samples(12)
    padding = padding_only(PADDED, 4)
    interleaved = [s for i in range(3) for s in samples[4 * i : 4 * i + 4] + padding]
    twice = train(PADDED, tmp_path, more={"train_dataset": interleaved}, gradient_accumulation_steps=2, **options)
    once = train(PADDED, tmp_path, more={"train_dataset": samples}, **options)
    assert_same(weights(twice), weights(once))


def test_a_batch_of_padding_only_leaves_the_feedback_as_it_was(tmp_path):
    """Its loss is 0/0 in the stock Trainer too; the feedback outlives it."""
    options = LEARNED | {"train_sampling_strategy": "sequential", "learning_rate": 0.0}
    dataset = PADDED.samples(4) + padding_only(PADDED, 4)
    for rule in ("lms", "ema"):
        both, first = (
            train(
                PADDED, tmp_path, more={"train_dataset": dataset}, feedback_rule=rule, **options | {"max_steps": steps}
            )
            for steps in (2, 1)
        )
        assert_equal(both.feedback, first.feedback)


@pytest.mark.parametrize("problem", [GPT2, PADDED, MLP], ids=lambda p: p.id)
def test_batches_of_one(problem, tmp_path):
    run = train(problem, tmp_path, per_device_train_batch_size=1, **REFITTED | {"learning_rate": 1e-3})
    assert all(torch.isfinite(w).all() for w in weights(run).values())
    assert logged(run, "grape/feedback/skipped")[-1] == (10, 0)
    fresh = make_trainer(problem, tmp_path, max_steps=1, **REFITTED | {"learning_rate": 0.0, "feedback_lr": 0.0})
    fresh.train()
    assert differ(weights(run), weights(fresh)) >= {"B_1", "B_2"}


# --- padding ---------------------------------------------------------------------------------------------------------


def collator(**options: Any) -> DataCollatorForLanguageModeling:
    tokenizer = Tokenizer(WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 31)}, unk_token="<pad>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right")
    return DataCollatorForLanguageModeling(fast, mlm=False, **options)


@pytest.mark.parametrize("jvp_mode", ["dual", "finite_difference"])
@pytest.mark.parametrize(("kind", "marked"), [("gpt2", True), ("llama", True), ("gpt2", False)])
@every_rule
def test_padded_and_unpadded_batches_estimate_alike(options, kind, marked, jvp_mode, tmp_path):
    """Texts of four lengths, padded to 16 in one batch, or each by itself, unpadded, in a micro-batch of its own.

    Where there is no attention mask, what is behind the last label is padding.

    The sums have another order, so a float32 rounding apart; finite differences divide such by 1e-4.
    """
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
    problem = Problem(kind, lambda: transformer(kind, max_position_embeddings=16, **no_dropout), GPT2.draw)
    texts = [{"input_ids": list(range(1 + n, 1 + n + length))} for n, length in enumerate((7, 12, 5, 9))]
    options = options | {"max_steps": 1, "jvp_mode": jvp_mode, "train_sampling_strategy": "sequential"}

    def trained(batch: int, **padding: Any) -> GrapeTrainer:
        collate = collator(**padding)
        kept = ("input_ids", "labels", "attention_mask")[: 3 if marked else 2]
        more = {"train_dataset": texts, "data_collator": lambda rows: {n: collate(rows)[n] for n in kept}}
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        return train(problem, tmp_path, more=more, remove_unused_columns=False, **options | sizes)

    padded, unpadded = trained(4, pad_to_multiple_of=16), trained(1)
    tolerance = 1e-6 if jvp_mode == "dual" else 1e-4
    for a, b in zip(padded.feedback, unpadded.feedback, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        assert (a - torch.eye(WIDTH)).abs().max() > 100 * tolerance
    loss, alone = (logged(run, "loss")[0][1] for run in (padded, unpadded))
    assert loss == pytest.approx(alone, rel=1e-5)


# --- drift -----------------------------------------------------------------------------------------------------------


def watch(mode: str, *measured: list[float], threshold: float = 0.5, patience: int = 2) -> DriftGuard:
    guard = DriftGuard(mode, threshold, patience, ["a", "b"])
    for step, cosines in enumerate(measured):
        guard.observe(step, torch.tensor(cosines))
    return guard


def test_each_block_by_its_own_alignment():
    guard = watch("block", [0.4, 0.9])
    assert guard.uncut == 0  # one measurement is not two
    guard = watch("block", [0.4, 0.9], [0.4, 0.9])
    assert [guard.cuts(i) for i in range(2)] == [False, True]
    assert not guard.everywhere
    for step in range(10):
        guard.observe(step, torch.tensor([0.9, 0.1]))  # 0.9, 0.82, 0.748, 0.6832, 0.62488, 0.572392, 0.5251528, 0.48...
        assert guard.cuts(1) == (step < 7)
    assert guard.everywhere  # and the first never came back


def test_the_mean_decides_for_all():
    assert watch("bp", [0.1, 0.8], [0.1, 0.8]).everywhere
    assert watch("bp", [0.1, 1.0], [0.1, 1.0]).uncut == 0


def test_in_a_row():
    """Smoothed: 0.49, 0.501, 0.4909, 0.48."""
    assert watch("bp", [0.49] * 2, [0.6] * 2, [0.4] * 2).uncut == 0
    assert watch("bp", [0.49] * 2, [0.6] * 2, [0.4] * 2, [0.4] * 2).uncut == 2


def test_what_is_undefined_is_no_measurement():
    assert watch("block", [0.1, NAN], [NAN, NAN], [0.1, NAN]).uncut == 1
    assert watch("bp", [0.1, NAN], [NAN, NAN], [0.1, NAN]).everywhere
    assert watch("no", [-1.0, -1.0], [-1.0, -1.0]).uncut == 0


def test_state_survives():
    guard = watch("block", [0.4, 0.9], [0.4, 0.1])
    other = DriftGuard("block", 0.5, 2, ["a", "b"])
    other.load_state_dict(guard.state_dict())
    for step in range(6):
        for g in (guard, other):
            g.observe(step, torch.tensor([0.0, 0.1]))
        assert (guard.smoothed, guard.below, guard.given_up) == (other.smoothed, other.below, other.given_up)
    another = DriftGuard("bp", 0.5, 2, ["a", "b"])
    another.load_state_dict(guard.state_dict())
    assert another.uncut == 0


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_an_uncut_boundary_lets_the_next_blocks_gradient_through():
    """As if the blocks on both sides of it were one; with none cut, that is backpropagation."""
    model = PlainLanguageModel(blocks=5).double()
    samples = PLAIN.samples(4)
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    ordinary = gradients(model, batch)
    B = list(torch.randn(4, WIDTH, WIDTH, dtype=torch.float64))
    for uncut in ([0], [1], [3], [0, 2], [1, 2, 3], [0, 1, 2, 3]):
        boundaries = Boundaries(list(model.blocks))
        with boundaries.attached(), boundaries.broadcast([None if i in uncut else b for i, b in enumerate(B)]):
            got = gradients(model, batch)
        cut = [i for i in range(5) if i not in uncut]
        fewer = Boundaries([model.blocks[i] for i in cut])
        with fewer.attached(), fewer.broadcast([B[i] for i in cut[:-1]]):
            assert_same(got, gradients(model, batch))
    assert_same(got, ordinary)


@pytest.mark.parametrize("mode", ["block", "bp"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(LEARNED, id="estimate"),
        pytest.param({"method": "dfa", "feedback_init": "gaussian", "alignment_steps": 1}, id="exact"),
    ],
)
def test_a_run_that_fell_back_is_the_stock_trainers(options, mode, tmp_path, caplog):
    """It falls in step 3, and is then compared with a stock run from its checkpoint at step 3."""
    options = options | {"fallback": mode, "fallback_threshold": 1.0, "fallback_patience": 3}
    options |= {"save_strategy": "steps", "save_steps": 3}
    run = train(GPT2, tmp_path / "run", **options)
    stock = train(GPT2, tmp_path / "stock", Trainer, resume=f"{tmp_path}/run/checkpoint-3")
    assert_same(dict(run.model.named_parameters()), dict(stock.model.named_parameters()))
    assert [number for _, number in logged(run, "grape/fallback/blocks")] == [0] * 2 + [2] * 8
    says = "falling back at step 3" if mode == "bp" else "falling back at step 3: the alignment at h_2"
    assert says in caplog.text
    assert caplog.text.count("falling back") == (1 if mode == "bp" else 2)
    unguarded = train(GPT2, tmp_path / "star", **options | {"fallback": "no"})
    assert differ(dict(unguarded.model.named_parameters()), dict(stock.model.named_parameters()))
    assert not logged(unguarded, "grape/fallback/blocks", at_all=False)


def test_a_run_that_fell_back_pays_for_no_estimate_or_calibration(tmp_path):
    options = {"fallback": "bp", "fallback_threshold": 1.0, "fallback_patience": 2, "alignment_steps": 1}
    run = train(GPT2, tmp_path, max_steps=20, **REFITTED | options)
    assert logged(run, "grape/calibration/steps")[-1][1] <= 1
    assert max(step for step, _ in logged(run, "grape/alignment/exact/mean")) <= 4
    assert len({value for _, value in logged(run, "grape/alignment/estimate/mean")}) <= 4


@pytest.mark.parametrize("measured", [0, 1], ids=["estimate", "exact"])
def test_a_run_whose_feedback_was_turned_round_calibrates_then_falls_back_and_says_so(measured, tmp_path, caplog):
    """B_l has the wrong sign from step 5 on and never learns better; the guards are all that there is."""

    def sabotaged(**options: Any) -> GrapeTrainer:
        run = make_trainer(
            GPT2, tmp_path, max_steps=40, lr_scheduler_type="constant", **LEARNED | {"feedback_lr": 0.0} | options
        )

        def turn_round(state: Any, **_: Any) -> None:
            if state.global_step == 4:
                run._run.feedback.B = [-b for b in run.feedback]

        run.add_callback(OnEvent("step_begin", turn_round))
        run.train()
        return run

    watchful = {"calibration_strategy": "adaptive", "calibration_cooldown": 2, "fallback_patience": 3}
    guarded = sabotaged(fallback="bp", alignment_steps=measured, **watchful)
    calibrated = [step for step, count in logged(guarded, "grape/calibration/steps") if count]
    fallen = [step for step, blocks in logged(guarded, "grape/fallback/blocks") if blocks == 2]
    assert 5 < calibrated[0] < fallen[0] < 30
    assert caplog.text.count("GrAPE: falling back at step") == 1
    unguarded = sabotaged()
    late, lost = (sum(loss for step, loss in logged(run, "loss") if step > 30) / 10 for run in (guarded, unguarded))
    first = logged(guarded, "loss")[0][1]
    assert late < first < lost  # 2.9, 3.0 and 3.4


def test_some_fall_back_and_some_do_not(tmp_path):
    """The learned B_2 stays aligned, B_1 of a run with gaussian start does not reach the threshold in time."""
    options = LEARNED | {"fallback": "block", "fallback_threshold": 0.97, "fallback_patience": 3}
    run = train(GPT2, tmp_path, max_steps=12, **options)
    assert logged(run, "grape/fallback/blocks")[-1] == (12, 1)
    assert [run._run.drift.cuts(i) for i in range(2)] == [False, True]
    assert all(math.isfinite(loss) for _, loss in logged(run, "loss"))


@pytest.mark.parametrize("method", ["dfa", "dkp"])
def test_a_guard_with_nothing_to_watch_is_refused(method, tmp_path):
    with pytest.raises(ValueError, match='fallback="bp" watches the alignment.*alignment_steps'):
        arguments(tmp_path, method=method, fallback="bp")
    arguments(tmp_path, method=method, fallback="bp", alignment_steps=10)


def test_a_baseline_without_matrices_has_nothing_to_fall_back_from(tmp_path: Path):
    with pytest.raises(ValueError, match='no feedback matrices.*fallback="no", got .*block'):
        arguments(tmp_path, method="fa", fallback="block")


def test_dkp_learns_behind_a_guard_too(tmp_path):
    """A product that is not finite is skipped like any other refinement."""
    feedback = Feedback([torch.eye(3)])
    feedback.take([torch.full((3, 3), INF)])
    assert_equal(feedback.B, [torch.eye(3)])
    spoilt = [{"x": s["x"] * (INF if i >= 4 else 1), "labels": s["labels"]} for i, s in enumerate(MLP.samples(8))]
    options = {"method": "dkp", "max_steps": 2, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    both = train(MLP, tmp_path, more={"train_dataset": spoilt}, **options)
    first = train(MLP, tmp_path, more={"train_dataset": spoilt}, **options | {"max_steps": 1})
    assert_equal(both.feedback, first.feedback)
    assert both._run.read_metrics()["feedback/skipped"] == 1
    assert F.mse_loss(both.feedback[0], torch.eye(WIDTH)) > 0
