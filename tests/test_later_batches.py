"""What the first batch does not show: later batches that do otherwise train as they should, or are refused by name.

The oracle is the stock Trainer: with as many sweeps as points the weights are those of backpropagation.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, train
from problems import Problem
from torch import Tensor, nn
from transformers import Trainer

from grape_hf import GrapeTrainer

WIDTH = 8


class Block(nn.Module):
    """A residual block that may do something else at times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.token = nn.Parameter(torch.randn(WIDTH))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Take h, or a condition and h."""
        h = inputs[-1]
        change = self.layer(self.norm(h if len(inputs) == 1 else h + inputs[0]))
        return h + torch.tanh(change)


class Masking(Block):
    """Puts a learned token where a mask says so, in place."""

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        if mask.any():
            h[mask] = self.token
        return super().forward(h)


class Network(nn.Module):
    """Four blocks; a sample has ``at``, and what is unusual happens where that is set."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.classifier = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Masking() if kind == "in place" else Block() for _ in range(4))
        self.condition = nn.Linear(1, WIDTH)
        self.second = nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor, at: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        for block in self.blocks:
            if self.kind == "in place":
                h = block(h, at > 0)
            elif self.kind == "another argument" and at.any():
                h = block(self.condition(at[:, None].to(h)), h)
            else:
                h = block(h)
        logits = self.classifier(h)
        loss = F.cross_entropy(logits, labels)
        if self.kind == "a term" and at.any():
            loss = loss + h.square().mean()
        if self.kind == "a second head" and at.any():
            loss = loss + F.cross_entropy(h @ self.second, labels % 2)
        return {"loss": loss, "logits": logits}


def problem(kind: str, when: list[bool]) -> Problem:
    """Samples of which one in four is unusual in the batches that ``when`` names, batches being of 4."""
    count = iter(range(10**6))

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        number = next(count)
        batch = number // 4 % len(when)
        at = torch.tensor(int(when[batch] and number % 4 == 1))
        return {"x": torch.randn(4, generator=generator), "at": at, "labels": torch.tensor(number % 3)}

    return Problem(kind, lambda: Network(kind), draw)


def learned(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


RUN = {"max_steps": 4, "samples": 16, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("when", [[True, False, False, True], [False, True, True, False]], ids=["first", "later"])
@pytest.mark.parametrize("kind", ["in place", "another argument"])
def test_sweeps_are_backpropagation_whatever_the_first_batch_did(kind: str, when: list[bool], tmp_path: Path):
    stock = train(problem(kind, when), tmp_path, Trainer, dtype=torch.float64, **RUN)
    swept = train(problem(kind, when), tmp_path, dtype=torch.float64, feedback_sweeps=9, **RUN)
    assert_same(learned(swept), learned(stock), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["a term", "a second head"])
@pytest.mark.parametrize("later", [1, 2, 4])
def test_a_loss_that_comes_to_read_the_last_block_beside_the_head(kind: str, later: int, tmp_path: Path):
    """It is seen in steps 1, 2, 4, 8 and so on."""
    when = [number >= later for number in range(8)]
    with pytest.raises(RuntimeError, match=r'beside the head.*feedback_space="hidden"'):
        train(problem(kind, when), tmp_path, feedback_space="logits", **RUN | {"max_steps": 8, "samples": 32})
    hidden = {"feedback_space": "hidden", "feedback_sweeps": 9} | RUN
    stock = train(problem(kind, when), tmp_path, Trainer, dtype=torch.float64, **RUN)
    assert_same(
        learned(train(problem(kind, when), tmp_path, dtype=torch.float64, **hidden)),
        learned(stock),
        rtol=1e-9,
        atol=1e-11,
    )


class Tasks(nn.Module):
    """A sentence's label by its first token, or labels of all tokens, as the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sentence, self.tokens = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        if target is None:
            return {"states": h}
        if target.shape[1] == 1:
            return {"loss": F.cross_entropy(self.sentence(h[:, 0]), target[:, 0])}
        return {"loss": F.cross_entropy(self.tokens(h).flatten(0, 1), target.flatten())}


@pytest.mark.parametrize("first", [1, 2, 4], ids=lambda n: f"{n} of the first batches are of sentences")
@pytest.mark.parametrize(
    "options",
    [{"method": "dfa", "feedback_init": "identity"}, {}, {"feedback_rule": "lms"}],
    ids=["identity", "maps", "estimates"],
)
def test_a_task_that_reads_all_positions_behind_one_that_reads_the_first(
    first: int, options: Any, tmp_path: Path, caplog
):
    """Seen in steps 1, 2, 4, 8; from the next step on errors stay at their positions, and an identity is one."""
    targets = [1 if i < 4 * first else 5 for i in range(32)]
    data = [{"x": torch.randint(9, (5,)), "target": torch.randint(12, (n,))} for n in targets]
    options = options | {"label_names": ["target"], "train_sampling_strategy": "sequential", "feedback_lr": 1e-9}
    args = arguments(tmp_path, max_steps=6, feedback_space="hidden", **options)
    trainer = GrapeTrainer(Tasks(), args, train_dataset=data)
    trainer.train()
    assert trainer._run.boundaries.read_at is None
    assert caplog.text.count("several positions of a sample") == 1
    for b in trainer.feedback:
        torch.testing.assert_close(b, torch.eye(WIDTH))


@pytest.mark.parametrize("options", [{"method": "dfa", "feedback_init": "identity"}, {}], ids=["identity", "maps"])
def test_a_resumed_run_does_not_ask_again_where_the_loss_reads(options: Any, tmp_path: Path):
    """The first batch after the resume reads one position, and the run had found out that others read all."""
    targets = [1 if (i // 4) % 2 == 0 else 5 for i in range(64)]
    data = [{"x": torch.randint(9, (5,)), "target": torch.randint(12, (n,))} for n in targets]
    options = options | {"label_names": ["target"], "train_sampling_strategy": "sequential", "max_steps": 8}

    def trained(resume: str | None = None) -> GrapeTrainer:
        torch.manual_seed(0)
        args = arguments(tmp_path, feedback_space="hidden", save_strategy="steps", save_steps=4, **options)
        trainer = GrapeTrainer(Tasks(), args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = trained()
    assert_same(learned(trained(str(tmp_path / "checkpoint-4"))), learned(straight))
    assert straight._run.boundaries.read_at is None


def test_two_forwards_for_one_loss_that_read_other_positions(tmp_path: Path):
    """The error of each is looked at, so that their order makes no difference."""

    class Both(GrapeTrainer):
        first = 0

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            def loss(of_tokens: int) -> Tensor:
                h, target = model(inputs["x"])["states"], inputs["target"]
                if of_tokens:
                    return F.cross_entropy(self.model.tokens(h).flatten(0, 1), target.flatten())
                return F.cross_entropy(self.model.sentence(h[:, 0]), target[:, 0])

            return loss(self.first) + loss(1 - self.first)

    data = [{"x": torch.randint(9, (5,)), "target": torch.randint(12, (5,))} for _ in range(16)]
    options = {"feedback_init": "identity", "method": "dfa", "label_names": ["target"], "optim": "sgd"}
    found = []
    for first in (0, 1):
        torch.manual_seed(0)
        args = arguments(tmp_path, max_steps=4, feedback_space="hidden", **options)
        trainer = Both(Tasks().double(), args, train_dataset=data)
        trainer.first = first
        trainer.train()
        assert trainer._run.boundaries.read_at is None
        found.append(learned(trainer))
    assert_same(*found, rtol=1e-9, atol=1e-11)


class WithStates(Tasks):
    """Hands out what its last block has made."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.tokens

    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        kept: list[Tensor] = []
        handle = self.blocks[-1].register_forward_hook(lambda *inputs: kept.append(inputs[-1]))
        found = super().forward(x, target)
        handle.remove()
        return found | {"states": kept[0]}


@pytest.mark.parametrize("reader", [0, 1])
def test_any_forward_of_a_loss_may_read_the_last_block_beside_the_head(reader: int, tmp_path: Path):
    class Two(GrapeTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = [model(**inputs) for _ in range(2)]
            return outputs[0]["loss"] + outputs[1]["loss"] + outputs[reader]["states"].pow(2).mean()

    torch.manual_seed(0)
    data = [{"x": torch.randint(9, (5,)), "target": torch.randint(12, (5,))} for _ in range(16)]
    args = arguments(tmp_path, max_steps=2, feedback_space="logits", label_names=["target"])
    with pytest.raises(RuntimeError, match="beside the head"):
        Two(WithStates(), args, train_dataset=data).train()


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_batch_that_is_left_out(skipped: int, tmp_path: Path):
    """There are no gradients, so that none came past the star."""

    class Skipping(GrapeTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(()) if self.state.global_step == skipped else super().training_step(*args, **kwargs)

    trainer = train(problem("plain", [False]), tmp_path, Skipping, **RUN)
    assert trainer.state.global_step == 4
    assert trainer._run is not None


class Lists(nn.Module):
    """Blocks that hand on a list with one tensor for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classifier = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(EachOne() for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = [self.stem(sample) for sample in x]
        for block in self.blocks:
            h = block(h)
        logits = self.classifier(torch.stack([sample.mean(0) for sample in h]))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class EachOne(Block):
    def forward(self, h: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return [Block.forward(self, sample) for sample in h]


def test_a_list_with_a_tensor_for_each_sample_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = [{"x": torch.randn(2, 4), "labels": torch.tensor(i % 3)} for i in range(8)]
    args = arguments(tmp_path, max_steps=1, feedback_space="hidden")
    GrapeTrainer(Lists(), args, train_dataset=data).train()
    assert "several tensors that do not depend on each other" in caplog.text


class SelfConditioned(Network):
    """Calls itself without gradients between two of its blocks."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.guessed = nn.Linear(3, WIDTH)

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        h = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number == 2 and labels is not None:
                with torch.no_grad():
                    guess = self(x)["logits"]
                h = h + self.guessed(guess)
            h = block(h)
        logits = self.classifier(h)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alignment_steps": 1},
        {"feedback_rule": "lms", "jvp_steps": 1},
        {"feedback_sweeps": 9, "alignment_steps": 1},
    ],
    ids=str,
)
def test_a_model_that_calls_itself(options: dict[str, Any], tmp_path: Path):
    def given() -> Problem:
        return Problem("self", SelfConditioned, problem("plain", [False]).draw)

    run = train(given(), tmp_path, dtype=torch.float64, **RUN | options)
    if "feedback_sweeps" in options:
        stock = train(given(), tmp_path, Trainer, dtype=torch.float64, **RUN)
        assert_same(learned(run), learned(stock), rtol=1e-9, atol=1e-11)
        for entry in run.state.log_history:
            assert entry.get("grape/alignment/exact/mean", 1.0) == pytest.approx(1.0)
