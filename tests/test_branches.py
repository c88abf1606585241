"""Losses that leave the chain: what is read beside y, forwards that begin half-way. As backpropagation, or refused.

The oracle is the stock Trainer: with as many sweeps as feedback points its weights have to come out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, count_hooks
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from grape_hf import GrapeMixin, GrapeTrainingArguments

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
MANY = 99  # sweeps
LENGTH, CLASSES = 8, 3


class Stock(Trainer):
    """Computes a loss that is given as a function."""

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss(model, inputs)


class Ours(GrapeMixin, Stock):
    pass


def bert() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(**shape, num_labels=CLASSES))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=32, n_embd=16, n_layer=4, n_head=2, n_positions=LENGTH)
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def t5() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, dropout_rate=0.0)
    return T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))


def samples(labels: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    rows = torch.randint(0, 32, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": labels(row)} for row in rows]


CLASSIFIED, TOKENS = samples(lambda row: row[0] % CLASSES), samples(lambda row: row)


def run(folder: Path, kind: type[Trainer], model: nn.Module, data: Any, loss: Loss, **options: Any) -> Trainer:
    of = GrapeTrainingArguments if issubclass(kind, GrapeMixin) else TrainingArguments
    args = arguments(folder, of, max_steps=3, optim="sgd", max_grad_norm=0, seed=1, **options)
    trainer = kind(model, args, train_dataset=data, loss=loss)
    trainer.train()
    return trainer


def assert_backpropagation(folder: Path, make: Callable[[], nn.Module], data: Any, loss: Loss, **options: Any) -> None:
    """With all sweeps the stock Trainer's weights come out; without sweeps all blocks move."""
    stock = dict(run(folder, Stock, make(), data, loss).model.named_parameters())
    swept = run(folder, Ours, make(), data, loss, feedback_sweeps=MANY, **options)
    assert_same(dict(swept.model.named_parameters()), stock, rtol=1e-5, atol=1e-7)
    direct = dict(run(folder, Ours, make(), data, loss, **options).model.named_parameters())
    before = dict(make().named_parameters())
    assert not [n for n, p in direct.items() if torch.equal(p, before[n]) and not torch.equal(stock[n], before[n])]


def assert_refused(
    folder: Path, make: Callable[[], nn.Module], data: Any, loss: Loss, match: str, **options: Any
) -> None:
    """Nothing is trained, and no hook stays."""
    for sweeps in (0, MANY):
        model = make()
        hooks, before = count_hooks(model), {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(RuntimeError, match=match):
            run(folder, Ours, model, data, loss, feedback_sweeps=sweeps, **options)
        assert_same(dict(model.named_parameters()), before)
        assert count_hooks(model) == hooks


def distilled(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs, output_hidden_states=True)
    return 1e-3 * out.loss + (out.hidden_states[-1] - torch.linspace(-1, 1, 16)).square().mean()


def test_hidden_states_beside_the_loss_that_a_model_returns(tmp_path):
    # transformers leaves hooks of its own that capture hidden states; only weights are compared here.
    assert_backpropagation(tmp_path, bert, CLASSIFIED, distilled)
    with pytest.raises(RuntimeError, match='beside the head .* Use feedback_space="hidden"'):
        run(tmp_path, Ours, bert(), CLASSIFIED, distilled, feedback_space="logits")


class Kept(nn.Module):
    """Keeps the output of its last block where only the loss finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classifier = nn.Embedding(32, 16), nn.Linear(16, CLASSES)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.stem(input_ids)
        for layer in self.layers:
            h = layer(h)
        self.features = h
        return {"logits": self.classifier(h.mean(1))}


def kept() -> Kept:
    torch.manual_seed(0)
    return Kept()


def on_features(share: float) -> Loss:
    def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        logits = model(**inputs)["logits"]
        side = (model.features - torch.linspace(-1, 1, 16)).square().mean()
        return share * F.cross_entropy(logits, inputs["labels"]) + side if share else side

    return loss


@pytest.mark.parametrize("path", ["matrix", "shortcut"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_features_that_only_the_loss_finds(share, path, tmp_path):
    """With the cross entropy beside it only the first step tells, by comparing what y sends with all that arrives.

    The way down the shortcut path leads by the same node, before the step's own backward does.
    """
    options = {"feedback_path": path}
    assert_refused(
        tmp_path, kept, CLASSIFIED, on_features(share), "beside the head", feedback_space="logits", **options
    )
    assert_backpropagation(tmp_path, kept, CLASSIFIED, on_features(share), feedback_space="hidden", **options)


def test_a_last_output_that_is_changed_in_place_in_front_of_the_head(tmp_path):
    class Changing(Kept):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            h = self.stem(input_ids)
            for layer in self.layers:
                h = layer(h)
            h.mul_(0.5)  # in place, behind the last block
            return {"loss": F.cross_entropy(self.classifier(h.mean(1)), labels)}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Changing()

    assert_backpropagation(
        tmp_path, make, CLASSIFIED, lambda model, inputs: model(**inputs)["loss"], feedback_space="logits"
    )


def test_a_first_step_that_overflows_is_not_held_against_the_loss(tmp_path):
    trainer = run(tmp_path, Ours, bert(), CLASSIFIED, lambda m, i: m(**i).loss * torch.inf, feedback_space="logits")
    assert trainer.state.global_step == 3


def apart(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(encoder_outputs=model.encoder(inputs["input_ids"]), labels=inputs["labels"]).loss


def test_an_encoder_that_the_loss_calls_by_itself(tmp_path):
    assert_backpropagation(tmp_path, t5, TOKENS, apart)
    refused = "calls the encoder by itself"
    assert_refused(tmp_path, t5, TOKENS, apart, refused, feedback_rule="lms", jvp_steps=1)
    assert_refused(tmp_path, t5, TOKENS, apart, refused, alignment_steps=1)


def twice(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    first = model(**inputs)
    again = model(encoder_outputs=(first.encoder_last_hidden_state,), labels=inputs["labels"].flip(1))
    return first.loss + again.loss


class Branching(Kept):
    """Its two upper blocks run twice on what the lowest has made."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        trunk = self.layers[0](self.stem(input_ids))
        branches = [self.layers[2](self.layers[1](trunk * scale)) for scale in (1.0, 0.5)]
        return {"loss": sum(F.cross_entropy(self.classifier(h.mean(1)), labels) for h in branches)}


def branching() -> Branching:
    torch.manual_seed(0)
    return Branching()


def test_forwards_that_branch_off_are_refused(tmp_path):
    match = "a second time on what the blocks below it had made once"
    assert_refused(tmp_path, t5, TOKENS, twice, match)
    assert_refused(tmp_path, branching, CLASSIFIED, lambda m, i: m(**i)["loss"], match, feedback_space="hidden")


def test_a_loss_in_the_middle_is_refused(tmp_path):
    def middle(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs, output_hidden_states=True).hidden_states[-2].square().mean()

    with pytest.raises(RuntimeError, match="does not use the output of the last block"):
        run(tmp_path, Ours, gpt2(), TOKENS, middle)
