"""Blocks that are left out at random: every block that ran gets B_l e, and y is what the last of them made."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, arguments, assert_same
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from grape_hf import GrapeTrainer

RATE = 0.5
STEP = dict(max_steps=1, optim="sgd", learning_rate=RATE, max_grad_norm=0, lr_scheduler_type="constant")
STEP |= dict(method="dfa", feedback_init="gaussian", logging_strategy="no", per_device_train_batch_size=8)
REFIT = dict(calibration_strategy="steps", calibration_interval=2, calibration_refit=True)


class Net(nn.Module):
    """Leaves out the blocks of ``dropped`` while it trains."""

    def __init__(self, dropped: tuple[int, ...] = (), segments: int = 0) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.fc, self.dropped, self.segments = nn.Linear(6, 3), dropped, segments

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        if self.segments:
            h = checkpoint_sequential(list(self.blocks), self.segments, h, use_reentrant=False)
        else:
            for number, block in enumerate(self.blocks):
                if not (self.training and number in self.dropped):
                    h = block(h)
        return {"loss": F.cross_entropy(self.fc(h), labels)}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator).double(), "labels": torch.tensor(i % 3)} for i in range(8)]


def by_hand(net: Net, B: list[Tensor], space: str) -> dict[str, Tensor]:
    """One step. h_l is what block l+1 reads, so a block that is left out takes its feedback point along."""
    samples = rows()
    x, labels = (torch.stack([row[name] for row in samples]) for name in ("x", "labels"))
    h, cuts = net.stem(x), []
    for number, block in enumerate(net.blocks):
        if number in net.dropped:
            continue
        if number > 0:
            cuts.append((h, number - 1))
            h = h.detach()
        h = block(h)
    y = h.detach().requires_grad_()
    logits = net.fc(y)
    F.cross_entropy(logits, labels).backward()
    e = y.grad
    if space == "logits":
        top = logits.detach().requires_grad_()
        (e_top,) = torch.autograd.grad(F.cross_entropy(top, labels), top)
    h.backward(e)
    for made, index in cuts:
        made.backward((e if space == "hidden" else e_top) @ B[index].mT)
    with torch.no_grad():
        return {name: p - RATE * (0 if p.grad is None else p.grad) for name, p in net.named_parameters()}


def after_a_step(kind: type[Net], dropped: tuple[int, ...], space: str, folder: Any) -> tuple[Net, Any, list[Tensor]]:
    """Return a net after a step, its twin before it, and the feedback."""
    torch.manual_seed(0)
    net, twin = kind(dropped).double(), kind(dropped).double()
    twin.load_state_dict(net.state_dict())
    trainer = GrapeTrainer(net, arguments(folder, **STEP, feedback_space=space), train_dataset=rows())
    trainer.train()
    return net, twin, trainer.feedback


@pytest.mark.parametrize("space", ["hidden", "logits"])
@pytest.mark.parametrize("dropped", [(), (0,), (1,), (3,), (2, 3), (0, 3), (0, 1, 2)])
def test_a_star_of_the_blocks_that_ran(dropped, space, tmp_path):
    net, twin, B = after_a_step(Net, dropped, space, tmp_path)
    assert_same(dict(net.named_parameters()), by_hand(twin, B, space), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", ["hidden", "logits"])
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_checkpointed_segments_of_several_blocks(segments, space, tmp_path, caplog):
    """Their hooks fire again in the backward: the step is that of the model without checkpoints."""
    learned = STEP | LEARNED | REFIT | {"max_steps": 4, "alignment_steps": 1}
    if Version(torch.__version__) < Version("2.12"):  # its checkpoints have no rule for tangents
        learned["jvp_mode"] = "finite_difference"
    for options in (STEP, learned):
        made = []
        for number in (0, segments):
            torch.manual_seed(0)
            net = Net(segments=number).double()
            trainer = GrapeTrainer(net, arguments(tmp_path, **options, feedback_space=space), train_dataset=rows())
            trainer.train()
            feedback = {f"B_{i}": b for i, b in enumerate(trainer.feedback)}
            made.append(dict(net.named_parameters()) | feedback)
        assert_same(made[1], made[0], rtol=1e-9, atol=1e-12)
    assert "got no error" not in caplog.text  # blocks that ran again are no forward that ended before y


def test_checkpointed_segments_that_calibrate_are_the_stock_trainers(tmp_path):
    made = []
    for kind, options in ((Trainer, {}), (GrapeTrainer, REFIT | {"calibration_interval": 1})):
        torch.manual_seed(0)
        net = Net(segments=2)
        args = arguments(tmp_path, TrainingArguments if kind is Trainer else type(arguments(tmp_path)), **options)
        data = [{"x": row["x"].float(), "labels": row["labels"]} for row in rows()]
        kind(net, args, train_dataset=data).train()
        made.append(dict(net.named_parameters()))
    assert_same(made[1], made[0])


def m2m100(**more: Any) -> nn.Module:
    sizes = dict(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2)
    sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32)
    return M2M100ForConditionalGeneration(M2M100Config(**sizes | more))


def bart() -> nn.Module:
    sizes = dict(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2)
    sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32)
    config = BartConfig(**sizes, encoder_layerdrop=0.3, decoder_layerdrop=0.3, forced_eos_token_id=None)
    return BartForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    config = Wav2Vec2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=10,
        conv_dim=(8,), conv_stride=(8,), conv_kernel=(8,), feat_extract_norm="layer", classifier_proj_size=8,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.4, mask_time_length=2,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


TEXT = [{"input_ids": (torch.arange(6) + i) % 37 + 3, "labels": (torch.arange(6) + i + 1) % 37 + 3} for i in range(32)]
SOUND = [{"input_values": torch.randn(160), "labels": i % 2} for i in range(32)]
MODELS = {
    "m2m100": (m2m100, TEXT),
    "m2m100-often": (lambda: m2m100(encoder_layerdrop=0.4, decoder_layerdrop=0.6), TEXT),
    "bart": (bart, TEXT),
    "wav2vec2": (wav2vec2, SOUND),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [LEARNED, REFIT | {"alignment_steps": 3}, {"method": "dfa", "feedback_points": 1}, {"feedback_space": "logits"}],
    ids=["grape", "refit", "one-point", "logits"],
)
def test_transformers_that_leave_layers_out_train(name, options, tmp_path):
    make, data = MODELS[name]
    if options.get("feedback_space") == "logits" and data is TEXT:
        options = options | {"method": "dfa"}
    torch.manual_seed(0)
    trainer = GrapeTrainer(make(), arguments(tmp_path, max_steps=60, **options), train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 60
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_calibration_with_layers_left_out_is_the_stock_trainers(tmp_path):
    made = []
    for kind, options in ((Trainer, {}), (GrapeTrainer, REFIT | {"calibration_interval": 1})):
        torch.manual_seed(0)
        args = arguments(tmp_path, TrainingArguments if kind is Trainer else type(arguments(tmp_path)), **options)
        trainer = kind(bart(), args, train_dataset=TEXT)
        trainer.train()
        made.append(dict(trainer.model.named_parameters()))
    assert_same(made[1], made[0])


class Sometimes(nn.Module):
    """A residual block that returns its input itself where it is ``idle`` (stochastic depth)."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.map, self.idle, self.copies = nn.Linear(6, 6), False, copies

    def forward(self, h: Tensor) -> tuple[Tensor]:
        if self.idle and self.training:
            return (h.clone() if self.copies else h,)
        return (h + torch.tanh(self.map(h)),)


class StochasticDepth(Net):
    """A net in which the blocks of ``dropped`` run, and do nothing."""

    def __init__(self, dropped: tuple[int, ...], copies: bool = False) -> None:
        super().__init__()
        self.blocks, self.dropped = nn.ModuleList(Sometimes(copies) for _ in range(4)), dropped

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        for number, block in enumerate(self.blocks):
            block.idle = number in self.dropped
            (h,) = block(h)
        return {"loss": F.cross_entropy(self.fc(h), labels)}


@pytest.mark.parametrize("space", ["hidden", "logits"])
@pytest.mark.parametrize("dropped", [(0, 1), (2, 3)])
def test_blocks_that_return_their_input_get_nothing_and_the_others_train(dropped, space, tmp_path):
    net, twin, feedback = after_a_step(StochasticDepth, dropped, space, tmp_path)
    x, labels = (torch.stack([row[name] for row in rows()]) for name in ("x", "labels"))
    made, h = [], twin.stem(x)
    for number, block in enumerate(twin.blocks):
        made.append(h if number in dropped else h + torch.tanh(block.map(h)))
        h = made[-1].detach().requires_grad_(number == 3)
    logits = twin.fc(h)
    (e,) = torch.autograd.grad(F.cross_entropy(logits, labels), h if space == "hidden" else logits, retain_graph=True)
    F.cross_entropy(logits, labels).backward()
    for h_l, delta in zip(made, [*(e @ B.mT for B in feedback), h.grad], strict=True):
        if h_l.requires_grad:
            h_l.backward(delta)
    expected = {n: p - RATE * (0 if p.grad is None else p.grad) for n, p in twin.named_parameters()}
    assert_same(dict(net.named_parameters()), expected, rtol=1e-9, atol=1e-12)


def test_blocks_that_return_a_copy_of_their_input_are_told_to_return_itself(tmp_path):
    trainer = GrapeTrainer(
        StochasticDepth((1,), copies=True).double(), arguments(tmp_path, **STEP), train_dataset=rows()
    )
    with pytest.raises(RuntimeError, match="block 2 .Sometimes. carries no gradient.* return its input itself"):
        trainer.train()
