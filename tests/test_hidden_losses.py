"""Whoever else reads h_l: block l gets the exact gradient of that beside B_l e. The oracle is autograd on the parts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
)

from grape_hf import GrapeMixin, GrapeTrainer

RATE = 0.5
STEP = dict(max_steps=1, optim="sgd", learning_rate=RATE, max_grad_norm=0, lr_scheduler_type="constant")
STEP |= dict(method="dfa", feedback_init="gaussian", feedback_space="hidden", logging_strategy="no")


class Block(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.map, self.inplace = nn.Linear(6, 6), inplace

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.map(h))


class Deep(nn.Module):
    """A loss at the end and one at each h_l, whose weights are ``aux``."""

    def __init__(self, aux: tuple[float, ...] = (1.0, 0.5, 0.25), checkpointed: bool = False) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 6), nn.ModuleList(Block() for _ in range(4))
        self.heads, self.out = nn.ModuleList(nn.Linear(6, 3) for _ in range(3)), nn.Linear(6, 3)
        self.aux, self.checkpointed = aux, checkpointed

    def side(self, h: list[Tensor], labels: Tensor) -> Tensor:
        return sum(w * F.cross_entropy(head(t), labels) for w, head, t in zip(self.aux, self.heads, h, strict=True))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = [self.stem(x)]
        for block in self.blocks:
            run = (lambda t, block=block: checkpoint(block, t, use_reentrant=False)) if self.checkpointed else block
            h.append(run(h[-1]))
        return {"loss": F.cross_entropy(self.out(h[-1]), labels) + self.side(h[1:4], labels)}


def rows(number: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator).double(), "labels": torch.tensor(i % 3)} for i in range(number)]


def by_hand(net: Deep, B: list[Tensor]) -> dict[str, Tensor]:
    """The weights after one step: each block's outputs get B_l e and the gradient of its own auxiliary loss."""
    samples = rows()
    x, labels = (torch.stack([row[name] for row in samples]) for name in ("x", "labels"))
    made, read = [], [net.stem(x)]
    for block in net.blocks:
        made.append(block(read[-1]))
        read.append(made[-1].detach().requires_grad_())
    (net.side([*made[:3]], labels)).backward(retain_graph=True)  # exact, and local: it ends at the next cut
    loss = F.cross_entropy(net.out(read[-1]), labels)
    loss.backward()
    e = read[-1].grad
    for h, delta in zip(made, [*(e @ b.mT for b in B), e], strict=True):
        h.backward(delta, retain_graph=True)
    with torch.no_grad():
        return {name: p - RATE * (0 if p.grad is None else p.grad) for name, p in net.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_auxiliary_heads_on_every_boundary(checkpointed, compiled, tmp_path):
    if checkpointed and compiled:
        pytest.skip("torch.compile of a hand-written checkpoint is a test of torch")
    torch.manual_seed(0)
    net = Deep(checkpointed=checkpointed).double()
    more = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    steps = {"max_steps": 1}
    trainer = GrapeTrainer(
        net, arguments(tmp_path, **STEP | more | steps, per_device_train_batch_size=8), train_dataset=rows()
    )
    torch.manual_seed(0)
    twin = Deep().double()
    trainer.train()
    assert_same(dict(net.named_parameters()), by_hand(twin, trainer.feedback), rtol=1e-9, atol=1e-12)


def test_sweeps_carry_the_error_at_y_and_no_auxiliary_loss(tmp_path):
    """Three sweeps: the exact gradient of the loss at the end, and of each auxiliary one what its own block gets."""
    torch.manual_seed(0)
    net = Deep().double()
    options = STEP | {"feedback_sweeps": 3, "per_device_train_batch_size": 8}
    trainer = GrapeTrainer(net, arguments(tmp_path, **options), train_dataset=rows())
    torch.manual_seed(0)
    twin = Deep().double()
    trainer.train()
    x, labels = (torch.stack([row[name] for row in rows()]) for name in ("x", "labels"))
    h, alone = [twin.stem(x)], [twin.stem(x)]
    for block in twin.blocks:
        h.append(block(h[-1]))
        alone.append(block(h[-2] if len(h) == 2 else h[-2].detach()))
    (F.cross_entropy(twin.out(h[-1]), labels) + twin.side(alone[1:4], labels)).backward()
    expected = {name: p - RATE * p.grad for name, p in twin.named_parameters()}
    assert_same(dict(net.named_parameters()), expected, rtol=1e-9, atol=1e-12)


def test_a_loss_on_one_boundary_alone_is_backpropagation_for_its_block(tmp_path):
    """As deep supervision does: what the head at the end gets is nothing."""
    moved = {}
    for method in ("bp", "grape"):
        torch.manual_seed(0)
        net = Deep(aux=(1.0, 0.0, 0.0)).double()
        net.out.weight.data.zero_()  # no error at the end but for the bias of the head
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        options = STEP | {"method": method, "feedback_init": "identity"}
        GrapeTrainer(net, arguments(tmp_path, **options, per_device_train_batch_size=8), train_dataset=rows()).train()
        moved[method] = {n: (p - before[n]).detach() for n, p in net.named_parameters() if n.startswith("blocks.0")}
        assert moved[method]
    assert all(m.any() for m in moved["bp"].values())
    assert_same(moved["grape"], moved["bp"], rtol=1e-9, atol=1e-12)


class Late(Trainer):
    """Asks for hidden states in the middle of a run: transformers registers its hooks then, behind everybody's."""

    begins_at = 2

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        on = self.state.global_step >= self.begins_at
        out = model(**inputs, output_hidden_states=on)
        return (out.hidden_states[1] - 1).square().mean() + 0 * out.loss if on else 0 * out.loss


class LateGrape(GrapeMixin, Late):
    pass


@pytest.mark.parametrize("begins_at", [0, 2])
def test_hidden_states_that_are_asked_for_late_are_learned_from(begins_at, tmp_path):
    data = [{"input_ids": (torch.arange(8) + i) % 30 + 1, "labels": i % 2} for i in range(32)]
    weights = {}
    for kind in (Late, LateGrape):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
        )
        model = BertForSequenceClassification(config)
        trainer = kind(model, arguments(tmp_path, max_steps=5, lr_scheduler_type="constant"), train_dataset=data)
        trainer.begins_at = begins_at
        trainer.train()
        weights[kind] = {n: p.detach().clone() for n, p in model.named_parameters()}
    # All of the loss comes from h_1, so the stock gradient is that of embeddings and block 1 alone.
    assert_same(weights[LateGrape], weights[Late], rtol=1e-5, atol=1e-6)
    assert differs_from_start(weights[Late])


def differs_from_start(weights: dict[str, Tensor]) -> bool:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    start = dict(BertForSequenceClassification(config).named_parameters())
    return any(not torch.equal(weights[name], p) for name, p in start.items())


class OnHidden(Trainer):
    """Distils into hidden states: pulls the mean of every one of them to a target."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        out = model(pixel_values=inputs["pixel_values"], output_hidden_states=True)
        return (out.hidden_states[1].mean(1) - 1).square().mean()


class OnHiddenGrape(GrapeMixin, OnHidden):
    pass


def test_hidden_state_distillation_into_a_vision_tower(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = {}
    for kind in (OnHidden, OnHiddenGrape):
        torch.manual_seed(0)
        model = CLIPVisionModel(config)
        options = {"max_steps": 2, "remove_unused_columns": False}
        kind(model, arguments(tmp_path, **options), train_dataset=[{"pixel_values": image} for image in images]).train()
        weights[kind] = dict(model.named_parameters())
    assert_same(weights[OnHiddenGrape], weights[OnHidden], rtol=1e-5, atol=1e-6)


def test_a_decode_head_that_works_on_all_stages(tmp_path):
    """SegFormer's: with no feedback at all (B_l = 0) block l still has the decode head's own gradient."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    data = [
        {
            "pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)).double(),
            "labels": torch.ones(16, 16).long(),
        }
        for i in range(4)
    ]
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(config).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = STEP | {"feedback_init": "zero", "blocks": _stages(model), "feedback_sharing": "position"}
    GrapeTrainer(model, arguments(tmp_path, **options), train_dataset=data).train()
    first = [n for n, p in model.named_parameters() if "stages.0.blocks.0" in n and "k_proj.bias" not in n]
    assert first
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in first)


def _stages(model: nn.Module) -> str:
    names = [n for n, m in model.named_modules() if type(m).__name__ == "SegformerLayer"]
    assert len(names) == 2
    return ",".join(names)
