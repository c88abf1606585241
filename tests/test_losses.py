"""Losses and models that are not one forward through trainable blocks: right gradients, against a star made by hand."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, assert_same, count_hooks, differ, logged, make_trainer, train, weights
from problems import DROPOUT, GPT2, PADDED, PLAIN, VOCABULARY, WIDTH, PlainLanguageModel, Problem, text
from torch import Tensor, nn
from transformers import Trainer

from grape_hf import GrapeMixin, GrapeTrainer

RATE = 0.1
# One step of plain gradient descent from a frozen gaussian B: what it did to the weights is the gradient.
ONE_STEP = dict(optim="sgd", learning_rate=RATE, max_steps=1, max_grad_norm=0, method="dfa", feedback_init="gaussian")
ONE_STEP |= dict(train_sampling_strategy="sequential")


def star_step(
    model: PlainLanguageModel,
    inputs: Sequence[Tensor],
    loss_of_outputs: Callable[..., Tensor],
    B: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The weights after one step, each block's gradient taken by itself from delta_l = B_l e; ``model`` is changed.

    Args:
        model: shows its stem, blocks and readout.
        inputs: token ids, one entry a forward.
        loss_of_outputs: the loss of the forwards' logits.
        B: ``(n_l, n_y)``, from h_1 on.
    """
    forwards = []
    for ids in inputs:
        h = model.stem(ids)
        outputs = []
        for block in model.blocks:
            outputs.append(block(h))
            h = outputs[-1].detach()
        forwards.append((outputs, h.requires_grad_()))
    loss_of_outputs(*(model.readout(y) for _, y in forwards)).backward()
    for outputs, y in forwards:
        deltas = [y.grad @ b.mT for b in B] + [y.grad]
        for output, delta in zip(outputs, deltas, strict=True):
            if output.requires_grad:
                output.backward(delta)
    with torch.no_grad():
        for p in model.parameters():
            p -= RATE * (0 if p.grad is None else p.grad)
    return dict(model.named_parameters())


def batch(problem: Problem, size: int = 4) -> dict[str, Tensor]:
    samples = problem.samples(size)
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


def assert_star(trainer: GrapeTrainer, loss_of_outputs: Callable[..., Tensor], *inputs: Tensor, **changes: Any) -> None:
    trainer.train()
    model = PLAIN.model(torch.float64)
    prepare(model, **changes)
    expected = star_step(model, inputs, loss_of_outputs, trainer.feedback)
    assert_same(dict(trainer.model.named_parameters()), expected, rtol=1e-9, atol=1e-12)


def prepare(model: nn.Module, frozen: Callable[[str], bool] = lambda name: False) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen(name))


# --- a plain module, with one forward --------------------------------------------------------------------------------


def test_a_plain_module_that_returns_a_loss(tmp_path):
    data = batch(PLAIN)
    trainer = make_trainer(PLAIN, tmp_path, dtype=torch.float64, samples=4, **ONE_STEP)
    assert_star(trainer, lambda logits: trainer.model.loss(logits, data["labels"]), data["input_ids"])


def test_calibration_at_every_step_is_backpropagation(tmp_path):
    calibrated = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 1, "calibration_refit": True}
    ours, stock = train(DROPOUT, tmp_path, **calibrated), train(DROPOUT, tmp_path, Trainer)
    assert_same(dict(ours.model.named_parameters()), dict(stock.model.named_parameters()))
    assert logged(ours, "grape/calibration/share")[-1] == (10, 1.0)


# --- several forwards for one loss -----------------------------------------------------------------------------------


def corrupted(ids: Tensor) -> Tensor:
    return ids.flip(-1)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE: the mean outputs of a text and of its corruption belong together, those of others do not."""
    a, b = F.normalize(a.mean(1), dim=-1), F.normalize(b.mean(1), dim=-1)
    return F.cross_entropy(5 * a @ b.mT, torch.arange(len(a)))


def preference(chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    log_odds = chosen.log_softmax(-1).amax(-1).sum(1) - rejected.log_softmax(-1).amax(-1).sum(1)
    return -F.logsigmoid(0.1 * (log_odds - reference)).mean()


class Contrastive(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        return contrast(model(ids)["logits"], model(corrupted(ids))["logits"])


class Preferring(Trainer):
    """As DPO: a forward of the model as reference, without gradients, between the two that are learned from."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        chosen = model(ids)["logits"]
        with torch.no_grad():
            reference = model(ids)["logits"].log_softmax(-1).amax(-1).sum(1) - 1
        return preference(chosen, model(corrupted(ids))["logits"], reference)


class ContrastiveGrape(GrapeMixin, Contrastive):
    pass


class PreferringGrape(GrapeMixin, Preferring):
    pass


def several(
    kind: type, folder: Any, problem: Problem = PLAIN, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    """A Trainer with one of the losses above, of either side of the mixin."""
    made = make_trainer(problem, folder, dtype=dtype, samples=4, **(ONE_STEP | options))
    return kind(model=made.model, args=made.args, train_dataset=made.train_dataset)


def test_a_contrastive_loss(tmp_path):
    ids = batch(PLAIN)["input_ids"]
    assert_star(several(ContrastiveGrape, tmp_path), contrast, ids, corrupted(ids))


def test_a_preference_loss(tmp_path):
    ids = batch(PLAIN)["input_ids"]
    with torch.no_grad():
        logits = PLAIN.model(torch.float64)(ids)["logits"]
        reference = logits.log_softmax(-1).amax(-1).sum(1) - 1
    assert_star(several(PreferringGrape, tmp_path), lambda a, b: preference(a, b, reference), ids, corrupted(ids))


@pytest.mark.parametrize(("ours", "stock"), [(ContrastiveGrape, Contrastive), (PreferringGrape, Preferring)])
def test_several_forwards_in_every_kind_of_step(ours, stock, tmp_path):
    """Calibration is the stock step; an estimate and a measurement are made, and change nothing in their own step."""
    calibrated = several(ours, tmp_path, calibration_strategy="steps", calibration_interval=1, max_steps=3)
    plain = several(stock, tmp_path, max_steps=3)
    calibrated.train(), plain.train()
    assert_same(dict(calibrated.model.named_parameters()), dict(plain.model.named_parameters()))

    frozen = several(ours, tmp_path, alignment_steps=1)
    learning = several(ours, tmp_path, **LEARNED | {"alignment_steps": 1})
    frozen.train(), learning.train()
    assert_same(dict(learning.model.named_parameters()), dict(frozen.model.named_parameters()))
    assert differ(weights(frozen), weights(learning)) == {"B_1", "B_2"}
    for trainer in (frozen, learning):
        assert -1 <= logged(trainer, "grape/alignment/exact/mean")[0][1] <= 1


OTHER_MODE = {"dual": "finite_difference", "finite_difference": "dual"}


class Concatenating(GrapeTrainer):
    """As trl's DPO: chosen and rejected texts go through the model in one batch, twice the size of the data's."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        ids, mask = (inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask"))
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
        chosen, rejected = (logits * mask[..., None]).log_softmax(-1).chunk(2)
        return -F.logsigmoid(chosen[..., 1].sum(1) - rejected[..., 2].sum(1)).mean()


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
def test_a_model_that_sees_twice_the_batch_with_padding(mode, tmp_path):
    """Both ways to take a derivative find the same; in float32, in which the norms of a Llama are in any case."""
    trainer, other = (
        several(Concatenating, tmp_path, PADDED, torch.float32, **LEARNED | {"max_steps": 3, "jvp_mode": m})
        for m in (mode, OTHER_MODE[mode])
    )
    trainer.train(), other.train()
    assert len(trainer.state.log_history) == 4
    assert_same(weights(trainer), weights(other), rtol=0, atol=5e-4)
    assert min((b - torch.eye(WIDTH)).abs().max() for b in trainer.feedback) > 0.1


# --- generation in the middle of a step ------------------------------------------------------------------------------


class Generating(Trainer):
    """Generates before its loss and after, as a user who wants to see samples would."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.generate(model, inputs)
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        self.generate(model, inputs)
        return loss

    def generate(self, model: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            text = model.generate(inputs["input_ids"][:2, :3], max_new_tokens=4, do_sample=False)
        assert text.shape[1] > 3
        self.generated = getattr(self, "generated", 0) + 1


class GeneratingGrape(GrapeMixin, Generating):
    pass


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "dfa"}, id="dfa"),
        pytest.param(LEARNED, id="grape"),
        pytest.param(LEARNED | {"jvp_mode": "finite_difference"}, id="finite-differences"),
        pytest.param({"calibration_strategy": "steps", "calibration_interval": 2, "alignment_steps": 3}, id="bp"),
    ],
)
def test_generation_in_the_middle_of_a_step_changes_nothing(options, tmp_path):
    plain, made = (make_trainer(GPT2, tmp_path, **options) for _ in range(2))
    generating = GeneratingGrape(model=made.model, args=made.args, train_dataset=made.train_dataset)
    plain.train(), generating.train()
    assert generating.generated >= 20
    assert_same(weights(generating), weights(plain))
    measured, expected = (
        logged(t, "grape/alignment/exact/mean", "alignment_steps" in options) for t in (generating, plain)
    )
    assert measured == expected


# --- blocks that the loss calls itself --------------------------------------------------------------------------------


class Counting(PlainLanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def stem(self, input_ids: Tensor) -> Tensor:
        self.seen += 1
        return super().stem(input_ids) * self.seen


class Stepping(Trainer):
    """Calls the blocks one by one, draws numbers of all kinds, and changes the batch in place."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.saw = getattr(self, "saw", set()) | {tuple(inputs["labels"].flatten().tolist())}
        inputs["labels"].add_(1).remainder_(VOCABULARY)
        h = model.stem(inputs["input_ids"]) + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        for block in model.blocks:
            h = block(h)
        loss = model.loss(model.readout(h), inputs["labels"])
        return (loss, {}) if return_outputs else loss


class SteppingGrape(GrapeMixin, Stepping):
    pass


def test_a_loss_that_calls_the_blocks_itself_trains_as_if_it_were_computed_once(tmp_path):
    """The first attempt at the first step finds out that it does; it leaves nothing behind, nor does the look."""
    problem = Problem("counting", Counting, text)
    options: dict[str, Any] = dict(optim="sgd", learning_rate=RATE, max_steps=3, feedback_sweeps=9, alignment_steps=1)
    made = make_trainer(problem, tmp_path, **options)
    ours = SteppingGrape(model=made.model, args=made.args, train_dataset=made.train_dataset)
    ours.train()
    stock = train(problem, tmp_path, Stepping, **options)
    assert logged(ours, "loss")[0] == logged(stock, "loss")[0]
    assert ours.model.seen == stock.model.seen == 3
    assert ours.saw == stock.saw  # measurements too, which are made after the step has changed its batch
    assert len(stock.saw) == 3
    learned = {name: w for name, w in weights(ours).items() if not name.startswith("B_")}
    assert_same(learned, weights(stock), rtol=1e-4, atol=1e-5)


# --- blocks that train from a later step on --------------------------------------------------------------------------


class Probed(PlainLanguageModel):
    """Runs its blocks without gradients in the first two steps, inside or by being called without."""

    inside = True

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.inside and self.probing)):
            h = self.tokens(input_ids)
            for block in self.blocks:
                h = block(h)
        logits = self.readout(h)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


class Probing(Trainer):
    frozen = False

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        probing = self.state.global_step < 2
        model.probing = probing and not self.frozen
        if self.frozen:
            for part in (model.tokens, model.blocks):
                part.requires_grad_(not probing)
        with torch.set_grad_enabled(model.inside or not model.probing):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if loss.requires_grad else loss + 0 * model.head.bias.sum()


class ProbingGrape(GrapeMixin, Probing):
    pass


class FreezingGrape(ProbingGrape):
    frozen = True


@pytest.mark.parametrize("inside", [True, False])
def test_blocks_without_gradients_at_first_are_refused_with_what_trains_the_same(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(Probed, "inside", inside)
    problem = Problem("probed", Probed, text)
    options: dict[str, Any] = dict(optim="sgd", learning_rate=RATE, max_steps=4, feedback_sweeps=9)

    def ours(kind: type) -> Any:
        made = make_trainer(problem, tmp_path, **options)
        return kind(model=made.model, args=made.args, train_dataset=made.train_dataset)

    with pytest.raises(RuntimeError, match=r"freeze these .*requires_grad_\(False\)"):
        ours(ProbingGrape).train()
    if inside:
        stock, frozen = train(problem, tmp_path, Probing, **options), ours(FreezingGrape)
        frozen.train()
        learned = {name: w for name, w in weights(frozen).items() if not name.startswith("B_")}
        assert_same(learned, weights(stock), rtol=1e-4, atol=1e-5)


# --- partly frozen models --------------------------------------------------------------------------------------------


FROZEN = {
    "embeddings-and-block-1": lambda name: name.startswith(("tokens", "blocks.0")),
    "embeddings-and-blocks-1-2": lambda name: name.startswith(("tokens", "blocks.0", "blocks.1")),
    "embeddings": lambda name: name.startswith("tokens"),
    "block-1": lambda name: name.startswith("blocks.0"),  # its output carries gradients to the embeddings all the same
    "block-2": lambda name: name.startswith("blocks.1"),
    "head": lambda name: name.startswith(("norm", "head")),
    "all-but-embeddings": lambda name: not name.startswith("tokens"),
    "all-but-block-1": lambda name: not name.startswith("blocks.0"),
    "all-but-block-2": lambda name: not name.startswith("blocks.1"),
    "all-but-block-3": lambda name: not name.startswith("blocks.2"),
    "all-but-head": lambda name: not name.startswith("head"),
    "all-but-biases": lambda name: not name.endswith("bias"),
}


@pytest.fixture(params=FROZEN)
def frozen(request) -> Callable[[str], bool]:
    return FROZEN[request.param]


def test_a_partly_frozen_model(frozen, tmp_path):
    data = batch(PLAIN)
    trainer = make_trainer(PLAIN, tmp_path, dtype=torch.float64, samples=4, **ONE_STEP)
    prepare(trainer.model, frozen)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert_star(trainer, lambda logits: trainer.model.loss(logits, data["labels"]), data["input_ids"], frozen=frozen)
    moved = differ(before, dict(trainer.model.named_parameters()))
    assert moved == {name for name in before if not frozen(name)}


def test_a_partly_frozen_model_in_every_kind_of_step(frozen, tmp_path):
    options = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 3, "calibration_refit": True}
    trainer = make_trainer(PLAIN, tmp_path, alignment_steps=2, **options)
    prepare(trainer.model, frozen)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = differ(before, dict(trainer.model.named_parameters()))
    assert moved == {name for name in before if not frozen(name)}
    assert len(trainer.feedback) == 2
    assert all(b.isfinite().all() for b in trainer.feedback)


def test_calibration_of_a_partly_frozen_model_is_backpropagation(frozen, tmp_path):
    options = LEARNED | {"calibration_strategy": "steps", "calibration_interval": 1, "calibration_refit": True}
    ours, stock = (
        make_trainer(PLAIN, tmp_path, max_steps=3, **options),
        make_trainer(PLAIN, tmp_path, Trainer, max_steps=3),
    )
    for trainer in (ours, stock):
        prepare(trainer.model, frozen)
        trainer.train()
    assert_same(dict(ours.model.named_parameters()), dict(stock.model.named_parameters()))


# --- losses that take gradients themselves ---------------------------------------------------------------------------


MAPS = LEARNED | {"feedback_rule": "local", "feedback_init": "auto"}


class Weighing(Trainer):
    """Two losses on one forward, weighed by the norms of their gradients."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        losses = outputs["loss"], outputs["logits"].logsumexp(-1).square().mean()
        weights = list(model.parameters())
        norms = [
            torch.stack([g.norm() for g in torch.autograd.grad(loss, weights, retain_graph=True)]).norm()
            for loss in losses
        ]
        return losses[0] + losses[1] * norms[0] / norms[1]


class WeighingGrape(GrapeMixin, Weighing):
    pass


@pytest.mark.parametrize("options", [{"feedback_init": "identity"}, MAPS], ids=["identity", "maps"])
def test_losses_weighed_by_their_gradients(options, tmp_path):
    """With as many sweeps as points each of the three backwards of a step is that of the stock Trainer."""
    made = {"max_steps": 3, "feedback_space": "hidden", "feedback_sweeps": 2} | options
    ours, stock = several(WeighingGrape, tmp_path, GPT2, **made), several(Weighing, tmp_path, GPT2, **made)
    ours.train(), stock.train()
    assert_same(dict(ours.model.named_parameters()), dict(stock.model.named_parameters()), rtol=1e-9, atol=1e-12)


class Penalising(Trainer):
    """A penalty on the gradient at the embeddings."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        loss = model(inputs_embeds=embedded, labels=inputs["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return loss + gradient.square().sum()


class PenalisingGrape(GrapeMixin, Penalising):
    pass


@pytest.mark.parametrize("options", [MAPS, {}, MAPS | {"feedback_sweeps": 1}], ids=["maps", "dfa", "sweep"])
def test_a_loss_that_differentiates_a_gradient_is_refused(options, tmp_path):
    refused = several(PenalisingGrape, tmp_path, GPT2, **options)
    stock = several(PenalisingGrape, tmp_path, GPT2, method="bp")
    for trainer in (refused, stock):
        trainer.model.set_attn_implementation("eager")  # the fused kernel has no second derivative
    with pytest.raises(RuntimeError, match='differentiates a gradient.*method="bp"'):
        refused.train()
    assert count_hooks(refused.model) == 0
    stock.train()
