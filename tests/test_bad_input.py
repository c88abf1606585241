"""What cannot work is refused: the error says what was expected, what came and what to do, and nothing is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, count_hooks, make_trainer
from problems import DROPOUT, GPT2, MLP, PLAIN, VOCABULARY, WIDTH, MixingBlock, PlainLanguageModel, Problem
from test_trainer import CHECKPOINTING
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertModel, Trainer

from grape_hf import GrapeTrainer, GrapeTrainingArguments


@contextmanager
def refusal(*says: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Expect an error whose message has all the words given, in this order."""
    with pytest.raises(kind) as caught:
        yield
    rest = str(caught.value)
    for words in says:
        assert words in rest, f"{words!r} is missing, or out of order, in: {caught.value}"
        rest = rest.split(words, 1)[1]


def untrained(trainer: Trainer, problem: Problem) -> None:
    assert trainer.state.global_step == 0
    assert_same(dict(trainer.model.named_parameters()), dict(problem.model().named_parameters()))
    assert count_hooks(trainer.model) == 0


# --- the model -------------------------------------------------------------------------------------------------------


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Product(), Product()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.second(torch.tanh(self.first(x)))
        return {"loss": (y - labels).square().mean(), "logits": y}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
        )
        self.query, self.document = BertModel(config), BertModel(config)


BARE = Problem("no-blocks", NoBlocks, MLP.draw)


def test_no_blocks(tmp_path):
    with refusal("found no blocks in NoBlocks", "expected modules that", "GrapeTrainingArguments(blocks="):
        make_trainer(BARE, tmp_path)


def test_no_blocks_do_not_matter_to_bp_and_can_be_named(tmp_path):
    for options in ({"method": "bp"}, {"blocks": "first,second", "jvp_steps": 1}):
        trainer = make_trainer(BARE, tmp_path, **options)
        trainer.train()
        assert trainer.state.global_step == 10


def test_a_named_block_that_does_not_exist(tmp_path):
    with refusal(
        "blocks='transformer.layers' does not exist in GPT2LMHeadModel", "Expected", "transformer.h (3 x GPT2"
    ):
        make_trainer(GPT2, tmp_path, blocks="transformer.layers")
    with refusal("blocks='mlp' stands for several modules: transformer.h.0.mlp"):
        make_trainer(GPT2, tmp_path, blocks="mlp")
    with refusal("transformer.drop (Dropout) has no parameters to train"):
        make_trainer(GPT2, tmp_path, blocks="transformer.drop")


def test_two_towers(tmp_path):
    with refusal(
        "cannot tell which blocks of TwoTowers",
        "Expected one chain",
        "query.encoder.layer (2 x BertLayer), document.encoder.layer (2 x BertLayer)",
        'GrapeTrainingArguments(blocks="query.encoder.layer")',
    ):
        make_trainer(Problem("two-towers", TwoTowers, GPT2.draw), tmp_path)


class Narrowing(PlainLanguageModel):
    """Blocks of two widths: 16 at h_1, 8 at y."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [MixingBlock(WIDTH), nn.Sequential(MixingBlock(WIDTH), nn.Linear(WIDTH, 8)), MixingBlock(8)]
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, VOCABULARY)


NARROWING = Problem("narrowing", Narrowing, PLAIN.draw)


@pytest.mark.parametrize(
    ("rule", "said"),
    [("lms", ["shortcut", "from blocks.0"]), ("local", ["one size", "blocks.0 has 16 numbers", "has 8"])],
)
def test_identity_needs_equal_sizes(rule, said, tmp_path):
    trainer = make_trainer(NARROWING, tmp_path, feedback_init="identity", feedback_rule=rule)
    with refusal('feedback_init="identity"', *said, 'Use feedback_init="gaussian"'):
        trainer.train()
    untrained(trainer, NARROWING)


def test_auto_takes_what_fits(tmp_path):
    trainer = make_trainer(NARROWING, tmp_path, max_steps=1)
    trainer.train()
    assert [tuple(b.shape) for b in trainer.feedback] == [(16, 8), (8, 8)]


def test_a_refused_model_is_still_in_the_mode_that_it_came_in(tmp_path):
    """Here a part of it is in eval mode, as ``from_pretrained`` hands models out; the first step turns that off."""
    trainer = make_trainer(GPT2, tmp_path, feedback_size_limit=1e-9)
    trainer.model.transformer.h.eval()
    before = [module.training for module in trainer.model.modules()]
    with refusal("would take 3.81e-06 GiB, more than feedback_size_limit=1e-09", "at transformer.h.0, is 16 x 16"):
        trainer.train()
    assert [module.training for module in trainer.model.modules()] == before
    untrained(trainer, GPT2)


class Headless(PlainLanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.readout_weights = self.head
        del self.head

    def readout(self, y: Tensor) -> Tensor:
        return self.readout_weights(self.norm(y))


def test_logits_space_needs_a_head(tmp_path):
    problem = Problem("headless", Headless, PLAIN.draw)
    with refusal('feedback_space="logits" needs a module that makes the logits', "Headless", 'feedback_space="hidden"'):
        make_trainer(problem, tmp_path, feedback_space="logits")
    make_trainer(problem, tmp_path, max_steps=1).train()  # auto does without


class Twice(PlainLanguageModel):
    """Its blocks run twice over, as in an ALBERT or a diffusion of steps: there is no chain h_1 .. h_L."""

    def stem(self, input_ids: Tensor) -> Tensor:
        h = super().stem(input_ids)
        for block in self.blocks:
            h = block(h)
        return h


class Backwards(PlainLanguageModel):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.stem(input_ids)
        for block in reversed(self.blocks):
            h = block(h)
        logits = self.readout(h)
        return {"loss": self.loss(logits, labels), "logits": logits}


class Skipping(PlainLanguageModel):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.blocks[2](self.blocks[0](self.stem(input_ids)))
        logits = self.readout(h)
        return {"loss": self.loss(logits, labels), "logits": logits}


@pytest.mark.parametrize("build", [Twice, Backwards, Skipping], ids=lambda build: build.__name__.lower())
def test_blocks_that_are_no_chain(build: Callable[[], nn.Module], tmp_path):
    problem = Problem("no-chain", build, PLAIN.draw)
    trainer = make_trainer(problem, tmp_path)
    with refusal("block", "chain of blocks", "blocks", kind=RuntimeError):
        trainer.train()
    untrained(trainer, problem)


# --- the training ----------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(GPT2.samples(64))


def test_an_epoch_of_unknown_length(tmp_path):
    made = make_trainer(GPT2, tmp_path, calibration_strategy="epoch", more={"train_dataset": Stream()})
    with refusal(
        'calibration_strategy="epoch" needs the length of an epoch', "streaming", 'Use calibration_strategy="steps"'
    ):
        made.train()
    untrained(made, GPT2)


@pytest.mark.parametrize("strategy", ["no", "steps", "adaptive"])
def test_a_stream_will_do_otherwise(strategy, tmp_path):
    options = {"calibration_strategy": strategy, "calibration_interval": 3}
    trainer = make_trainer(GPT2, tmp_path, more={"train_dataset": Stream()}, **options)
    trainer.train()
    assert trainer.state.global_step == 10


def test_an_interval_shorter_than_a_step(tmp_path):
    trainer = make_trainer(GPT2, tmp_path, calibration_strategy="epoch", calibration_interval=0.1)
    with refusal("calibration_interval=0.1 epochs is less than one optimiser step", "has 8", "at least 0.125"):
        trainer.train()
    untrained(trainer, GPT2)


@pytest.mark.parametrize(
    "options",
    [
        {"jvp_steps": 1},
        {"jvp_steps": 1, "jvp_mode": "finite_difference", "feedback_rule": "ema"},
        {"method": "dfa"},
        {"calibration_strategy": "steps", "calibration_interval": 2},
        {"method": "dfa", "alignment_steps": 1},
    ],
)
def test_samples_of_another_size_where_positions_have_matrices_of_their_own(options, tmp_path):
    samples = [
        {name: t[: 8 if i < 4 else 6] for name, t in sample.items()} for i, sample in enumerate(PLAIN.samples(8))
    ]
    options = options | {"train_sampling_strategy": "sequential", "feedback_space": "logits"}
    trainer = make_trainer(PLAIN, tmp_path, feedback_sharing="none", more={"train_dataset": samples}, **options)
    with refusal("feedback_sharing='none'", "h_1", "128 numbers", ", 6, 16), which is 96", "pad, crop", '"position"'):
        trainer.train()
    assert trainer.state.global_step == 1
    assert count_hooks(trainer.model) == 0
    make_trainer(PLAIN, tmp_path, max_steps=2, more={"train_dataset": samples}, **options).train()


class Convolution(nn.Module):
    """A convolution along time that is no module of torch's: nothing tells where its channels are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=1)


class ChannelsFirst(nn.Module):
    """A stack of convolutions along time, (batch, channels, positions) between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(Convolution(), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("sharing", ["auto", "position"])
def test_lengths_that_vary_behind_the_channels(sharing, tmp_path):
    samples = [{"x": torch.randn(4, 8 if i < 4 else 6)} for i in range(8)]
    options = {"train_sampling_strategy": "sequential", "label_names": []}
    args = arguments(tmp_path, feedback_sharing=sharing, **options)
    trainer = GrapeTrainer(ChannelsFirst(), args, train_dataset=samples)
    with refusal("h_1", "vectors of 8 numbers", "(4, 4, 6)", "pad, crop", "(batch, positions, channels)"):
        trainer.train()


class Ends(PlainLanguageModel):
    """Blocks 2 and 3 are left out, and with them y."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.readout(self.blocks[0](self.stem(input_ids)))
        return {"loss": self.loss(logits, input_ids if labels is None else labels), "logits": logits}


def test_blocks_that_are_left_out_are_named_where_y_is_not_reached(tmp_path):
    problem = Problem("ends", Ends, PLAIN.draw)
    trainer = make_trainer(problem, tmp_path, feedback_space="hidden")
    with refusal("expected blocks 1 to", "run once each and in order", "in the order [1]", kind=RuntimeError):
        trainer.train()
    untrained(trainer, problem)


def test_more_feedback_points_than_there_is_room_for_are_refused(tmp_path):
    with refusal("feedback_points=3", "transformer.h.0 to transformer.h.2 are 3 blocks", "at most 2"):
        make_trainer(GPT2, tmp_path, feedback_points=3)
    make_trainer(GPT2, tmp_path, feedback_points=2)


@pytest.mark.parametrize("said", [{"use_reentrant": True}, {"preserve_rng_state": False}], ids=["said", "default"])
def test_reentrant_checkpointing_is_refused(said, tmp_path):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": said}
    with refusal("use_reentrant", "cuts the gradients", '{"use_reentrant": False}'):
        make_trainer(DROPOUT, tmp_path, **options)
    make_trainer(DROPOUT, tmp_path, method="bp", **options)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own complaint
@pytest.mark.parametrize(
    "rule", [{"feedback_rule": "lms"}, {"feedback_rule": "local"}, {"jvp_steps": 4}, {"feedback_sweeps": 1}]
)
def test_reentrant_checkpointing_behind_the_trainers_back(rule, tmp_path):
    trainer = make_trainer(DROPOUT, tmp_path, **rule)
    enable = getattr(trainer.model, f"{CHECKPOINTING}_enable")
    enable({"use_reentrant": True})
    hooks = count_hooks(trainer.model)  # transformers puts one on the embeddings
    # Before transformers 5.23 hooks ran inside the checkpoint.
    with pytest.raises(
        RuntimeError,
        match=r"(block [12] \(GPT2Block\) (carries no gradient|is recomputed)|blocks run in the backward).*False",
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    assert count_hooks(trainer.model) == hooks


class SharedHead(GrapeTrainer):
    """Two forwards, and then the head once for both: in logits space two chains of blocks lead to one y."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Tensor:
        first, second = model.stem(inputs["input_ids"]), model.stem(inputs["labels"])
        for block in model.blocks:
            first = block(first)
        for block in model.blocks:
            second = block(second)
        return model.readout(first + second).square().mean()


def test_two_forwards_for_one_head(tmp_path):
    def run(space: str) -> Trainer:
        args = arguments(tmp_path, feedback_space=space, max_steps=1)
        trainer = SharedHead(PLAIN.model(), args, train_dataset=PLAIN.samples(8))
        trainer.train()
        return trainer

    with refusal("once each", 'feedback_space="hidden"', kind=RuntimeError):
        run("logits")
    assert run("hidden").state.global_step == 1


# --- options that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "graep"}, ["method='graep': expected one of 'grape', 'dfa', 'bp'"]),
        ({"calibration_strategy": "steps", "calibration_interval": 2.5}, ["calibration_interval", "2.5"]),
        ({"calibration_refit": True}, ["calibration_refit=True", "set calibration_strategy"]),
        ({"perturbation_space": "weight"}, ["perturbation_space='weight'", "feedback_rule", "activation"]),
        ({"method": "dfa", "calibration_strategy": "adaptive"}, ["adaptive", "dfa", "alignment_steps"]),
        ({"blocks": ["a", "b"]}, ["blocks=['a', 'b']", "one string", "commas"]),
        ({"feedback_lr": 1.5}, ["feedback_lr=1.5", "at most 1", "feedback_rule='local'"]),
        ({"feedback_lr": 1.5, "jvp_fraction": 0.5}, ["feedback_lr=1.5", "at most 1", "feedback_rule='lms'"]),
        ({"feedback_lr": 1.5, "method": "fdfa"}, ["feedback_lr=1.5", "at most 1", "feedback_rule='ema'"]),
        ({"feedback_lr": float("inf")}, ["feedback_lr=inf", "at least 0 and finite"]),
        ({"jvp_steps": float("inf")}, ["jvp_steps=inf", "a whole number, at least 1 and finite"]),
        ({"alignment_steps": 10**400}, ["alignment_steps=1000", "a whole number"]),
        (
            {"calibration_strategy": "steps", "calibration_interval": float("inf")},
            ["calibration_interval=inf", "above 0 and finite"],
        ),
    ],
)
def test_options_are_refused_when_they_are_made(options, says, tmp_path):
    with refusal(*says):
        GrapeTrainingArguments(output_dir=str(tmp_path), **options)
