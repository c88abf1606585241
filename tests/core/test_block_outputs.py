"""Blocks may return their hidden states in a tuple, a mapping or a dataclass; of other types the refusal says which."""

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LEARNED, arguments, assert_same, fitted
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from grape_hf import GrapeTrainer
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.nested import first_floating, get, put, tensors
from grape_hf.engine.probe import probe

Named = namedtuple("Named", ["hidden", "gate"])


@dataclass
class Record:
    mask: Tensor
    hidden: Tensor


KINDS = {
    "tensor": (lambda h: h, lambda out: out),
    "tuple": (lambda h: (h, h.sum()), lambda out: out[0]),
    "list": (lambda h: [h, None], lambda out: out[0]),
    "namedtuple": (lambda h: Named(h, h.sum()), lambda out: out.hidden),
    "dict": (lambda h: {"hidden": h}, lambda out: out["hidden"]),
    "model-output": (lambda h: BaseModelOutput(last_hidden_state=h), lambda out: out.last_hidden_state),
    "dataclass": (lambda h: Record(torch.ones(2).long(), h), lambda out: out.hidden),
    "second": (lambda h: (h.detach() * 0, h), lambda out: out[1]),
    "nested": (lambda h: {"states": (h, 1.0)}, lambda out: out["states"][0]),
}


class Block(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.map, self.make = nn.Linear(4, 4), make

    def forward(self, h: Tensor) -> Any:
        return self.make(torch.tanh(self.map(h)))


class Net(nn.Module):
    def __init__(self, make: Any, read: Any) -> None:
        super().__init__()
        self.blocks, self.read = nn.ModuleList(Block(make) for _ in range(4)), read

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = self.read(block(x))
        return {"loss": x.square().mean()}


def weights(kind: str, trainer: type, folder: Any, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    data = [{"x": torch.randn(4)} for _ in range(16)]
    net = Net(*KINDS[kind])
    arguments_kind = {} if trainer is GrapeTrainer else {"kind": TrainingArguments}
    args = arguments(folder, max_steps=5, label_names=[], **arguments_kind, **options)
    trainer(net, args, train_dataset=data).train()
    return dict(net.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"method": "dfa"}, LEARNED | {"alignment_steps": 2}], ids=["dfa", "grape"])
def test_every_kind_trains_like_a_tensor(kind, options, tmp_path):
    assert_same(weights(kind, GrapeTrainer, tmp_path, **options), weights("tensor", GrapeTrainer, tmp_path, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_of_every_kind_is_backpropagation(kind, tmp_path):
    calibrated = {"calibration_strategy": "steps", "calibration_interval": 1}
    ours = weights(kind, GrapeTrainer, tmp_path, **calibrated)
    assert_same(ours, weights(kind, Trainer, tmp_path))


class Sometimes(Block):
    """Returns something beside its hidden states, if that is wanted; takes what the block before returned."""

    def forward(self, given: Any, wanted: bool) -> Any:
        h = super().forward(given[0] if isinstance(given, tuple) else given)
        return (h, h.mean()) if wanted else h


class Changing(nn.Module):
    """Blocks that return a tuple in some batches."""

    def __init__(self, passed_on: bool) -> None:
        super().__init__()
        self.blocks, self.passed_on = nn.ModuleList(Sometimes(lambda h: h) for _ in range(4)), passed_on

    def forward(self, x: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x, bool(wanted.any()))
            x = x[0] if isinstance(x, tuple) and not self.passed_on else x
        return {"loss": (x[0] if isinstance(x, tuple) else x).square().mean()}


@pytest.mark.parametrize("options", [LEARNED, dict(feedback_rule="local"), dict(feedback_sweeps=9)])
@pytest.mark.parametrize("passed_on", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_blocks_that_return_a_tuple_in_some_batches(first, passed_on, options, tmp_path):
    def trained(wanted: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Changing(passed_on)
        data = [{"x": torch.randn(4), "wanted": torch.tensor(wanted(i))} for i in range(8)]
        settings = dict(max_steps=4, per_device_train_batch_size=1, train_sampling_strategy="sequential")
        GrapeTrainer(model, arguments(tmp_path, **settings, **options), train_dataset=data).train()
        return dict(model.named_parameters())

    assert_same(trained(lambda i: (i % 2 == 0) == first), trained(lambda i: False))


class Own:
    def __init__(self, h: Tensor) -> None:
        self.h = h


def test_another_type_is_named(tmp_path):
    net = Net(Own, lambda out: out.h)
    args = arguments(tmp_path, max_steps=1, label_names=[], blocks="blocks")
    trainer = GrapeTrainer(net, args, train_dataset=[{"x": torch.randn(4)} for _ in range(4)])
    with pytest.raises(TypeError, match=r"block 1 \(Block\).*a mapping or a dataclass.*it returned Own"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_paths():
    h = torch.ones(2)
    for value in (h, (1, h), [h], Named(h, 2), {"a": {"b": (h,)}}, BaseModelOutput(h), Record(h.long(), h)):
        path = first_floating(value)
        assert path is not None
        assert get(value, path) is h
        new = put(value, path, h * 2)
        assert type(new) is type(value)
        assert torch.equal(get(new, path), h * 2)
        assert get(value, path) is h  # what was given is as it was
    assert first_floating({"a": [1, torch.ones(2).long()]}) is None
    assert get({"a": 1}, ("b",)) is None
    assert get(h, (0,)) is None
    assert [path for path, _ in tensors((h, {"a": h}))] == [(0,), (1, "a")]


class Timed(nn.Module):
    """Hands on a time, or whatever else it is given, before its hidden states, or behind them."""

    def __init__(self, t_first: bool) -> None:
        super().__init__()
        self.map, self.t_first = nn.Linear(4, 4), t_first

    def forward(self, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + torch.tanh(self.map(h + t))
        return (t, h) if self.t_first else (h, t)


class TimedNet(nn.Module):
    """Reads a learned time, or constants, in every block and in the loss."""

    def __init__(self, learned: bool, t_first: bool) -> None:
        super().__init__()
        self.time, self.stem, self.learned, self.t_first = nn.Linear(4, 4), nn.Linear(4, 4), learned, t_first
        self.blocks = nn.ModuleList(Timed(t_first) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        t, h = self.time(x) if self.learned else x.cos(), self.stem(x)
        for block in self.blocks:
            made = block(t, h)
            t, h = made if self.t_first else made[::-1]
        return {"loss": (h * (1 + t)).square().mean()}


WEIGHTS = {"feedback_rule": "cosine", "perturbation_space": "weight", "jvp_steps": 1}


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "constant"])
@pytest.mark.parametrize(
    "options", [{"method": "dfa"}, {"feedback_sweeps": 1}, WEIGHTS], ids=["dfa", "sweep", "weights perturbed"]
)
def test_what_comes_before_the_hidden_states_is_not_taken_for_them(options, learned, tmp_path):
    data, made = [{"x": torch.randn(4)} for _ in range(16)], []
    for t_first in (True, False):
        torch.manual_seed(0)
        net = TimedNet(learned, t_first)
        args = arguments(tmp_path, max_steps=5, label_names=[], feedback_space="hidden", **options)
        trainer = GrapeTrainer(net, args, train_dataset=data)
        trainer.train()
        made.append(dict(net.named_parameters()) | {f"B_{i}": B for i, B in enumerate(trainer.feedback)})
    assert_same(*made)


class WithResidual(nn.Module):
    """Hands on (hidden, residual), as a Mamba's fused block does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, h: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = h + residual
        return torch.tanh(self.map(self.norm(residual))), residual


class ResidualNet(nn.Module):
    """Its head, of 6 outputs, reads both that the last block returns, or the first alone."""

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.stem, self.both, self.head = nn.Linear(4, 4), both, nn.Linear(4, 6)
        self.blocks = nn.ModuleList(WithResidual() for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, residual = self.stem(x), torch.zeros_like(x)
        for block in self.blocks:
            h, residual = block(h, residual)
        return {"loss": self.head(h + residual if self.both else h).square().mean()}


@pytest.mark.parametrize(("both", "space"), [(True, "auto"), (True, "logits"), (False, "hidden"), (False, "logits")])
def test_sweeps_go_around_blocks_by_what_they_hand_on_beside_their_hidden_states(both, space, tmp_path):
    made = []
    for kind, trainer in ((None, GrapeTrainer), (TrainingArguments, Trainer)):
        torch.manual_seed(0)
        net, data = ResidualNet(both), [{"x": torch.randn(4)} for _ in range(16)]
        options = {"feedback_sweeps": 3, "feedback_space": space, "optim": "sgd", "max_steps": 5, "label_names": []}
        args = arguments(tmp_path, **options, **({"kind": kind} if kind else {}))
        trainer(net, args, train_dataset=data).train()
        made.append(dict(net.named_parameters()))
    assert_same(*made, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("points", [0, 1])
def test_sweeps_of_an_error_that_is_measured_at_one_of_two_streams_are_refused(points, tmp_path):
    options = {"feedback_sweeps": 1, "feedback_points": points, "feedback_space": "hidden", "label_names": []}
    args = arguments(tmp_path, **options)
    trainer = GrapeTrainer(ResidualNet(), args, train_dataset=[{"x": torch.randn(4)} for _ in range(16)])
    with pytest.raises(ValueError, match="two outputs of the last block.*feedback_sweeps=0"):
        trainer.train()


class Gated(nn.Module):
    """Returns its hidden states, and beside them a gate that it has made of these."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + torch.tanh(self.map(h))
        return h, torch.sigmoid(h.sum(-1, keepdim=True))


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + torch.tanh(self.f(b))
        return a, b + torch.tanh(self.g(a))


class TwoOutputs(nn.Module):
    """Its head reads two outputs of the last block, or the second alone; or the loss reads one, the head another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make = {"gate": Gated, "state": lambda: nn.LSTM(4, 4, batch_first=True)}.get(kind.split()[0], Reversible)
        self.kind, self.blocks, self.head = kind, nn.ModuleList(make() for _ in range(4)), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, other, side = x, x, x.new_zeros(())
        for block in self.blocks:
            if isinstance(block, nn.LSTM):
                h, (other, _) = block(h)
            else:
                h, other = block(h, other) if isinstance(block, Reversible) else block(h)
        if self.kind == "gate":
            h = h * other
        elif self.kind == "state and mean":
            h = h.mean(1) + other[-1]
        elif self.kind == "state":
            h = other[-1]
        elif self.kind == "both streams":
            h = h + other
        elif self.kind == "second stream":
            h = other
        else:
            side = other.square().mean()
        return {"loss": (self.head(h) - 1).square().mean() + side}


def trained_on_two(kind: str, folder: Path, trainer: type[Trainer] = GrapeTrainer, **options: Any) -> dict[str, Tensor]:
    rows = [{"x": x} for x in torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(0))]
    settings = {"max_steps": 5, "learning_rate": 1e-2, "label_names": []}
    return fitted(lambda: TwoOutputs(kind), rows, folder, trainer, **settings, **options)


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        *(("gate", "auto"), ("gate", "logits"), ("both streams", "auto"), ("state and mean", "logits")),
        *(("second stream", "auto"), ("second stream", "logits"), ("state", "logits")),
    ],
)
def test_a_head_may_read_whatever_the_last_block_returns(kind, space, tmp_path):
    """As many sweeps as points are backpropagation, in the first step too, which looks at what the head sends."""
    swept = trained_on_two(kind, tmp_path, feedback_sweeps=3, feedback_space=space)
    assert_same(swept, trained_on_two(kind, tmp_path, Trainer), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["gate", "state and mean"])
def test_where_the_loss_reads_two_outputs_of_the_last_block_alone_it_can_be_left_to_the_head(kind, tmp_path, caplog):
    problem = "two outputs of the last block .*at one of them"
    advice = "blocks.0,blocks.1,blocks.2"
    with pytest.raises(ValueError, match=f'{problem}.*Set blocks="{advice}", .* or feedback_sweeps=0'):
        trained_on_two(kind, tmp_path, feedback_sweeps=3, feedback_space="hidden")
    trained_on_two(kind, tmp_path, feedback_space="hidden")
    (warning,) = [r.message for r in caplog.records if "two outputs" in r.message]
    assert "what comes by the other reaches the last block alone" in warning
    swept = trained_on_two(kind, tmp_path, feedback_sweeps=3, feedback_space="hidden", blocks=advice)
    assert_same(swept, trained_on_two(kind, tmp_path, Trainer), rtol=1e-5, atol=1e-7)


def test_a_loss_on_one_stream_and_a_head_on_the_other_are_beside_each_other(tmp_path, caplog):
    for space in ("auto", "hidden"):
        with pytest.raises(ValueError, match="two outputs of the last block that the blocks hand on"):
            trained_on_two("streams apart", tmp_path, feedback_sweeps=3, feedback_space=space)
    with pytest.raises(ValueError, match="the loss reads the output of the last block beside it"):
        trained_on_two("streams apart", tmp_path, feedback_space="logits")
    trained_on_two("streams apart", tmp_path)
    assert [r for r in caplog.records if "two outputs" in r.message]


@pytest.mark.parametrize(("net", "around"), [(ResidualNet(), True), (TimedNet(True, False), False)])
def test_what_blocks_hand_on_goes_around_if_it_is_made_of_hidden_states(net, around):
    boundaries = Boundaries(net.blocks, readers=[[block] for block in net.blocks[1:]])
    probe(net, boundaries, lambda: net(torch.randn(2, 4)))
    assert boundaries.around is around


@pytest.mark.parametrize("kind", ["complex", "no batch"])
def test_hidden_states_that_no_boundary_can_be_put_behind_are_described(kind, tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, h: Tensor) -> Tensor:
            return self.layer(h.real).to(torch.complex64) if kind == "complex" else self.layer(h)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Odd() for _ in range(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = x[0] if kind == "no batch" else x.to(torch.complex64)
            for block in self.blocks:
                h = block(h)
            return {"loss": h.real.pow(2).mean()}

    found = r"complex64 of shape \(4, 6\)" if kind == "complex" else r"float32 of shape \(6,\)"
    trainer = GrapeTrainer(Model(), arguments(tmp_path), train_dataset=[{"x": torch.randn(6)} for _ in range(8)])
    with pytest.raises(TypeError, match=rf"block 1 \(Odd\) was expected .*\(batch, ...\).*{found}"):
        trainer.train()
