"""What the first forward shows: models whose blocks make no chain are refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, count_hooks, fitted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from grape_hf import GrapeArgumentsMixin, GrapeTrainer
from grape_hf.engine.run import GrapeRun


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return self.map(h).tanh()


class SideBySide(nn.Module):
    """Two towers whose outputs the head reads: no chain, although the blocks run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList([Layer(), Layer()]) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = b = x
        for layer in self.left:
            a = layer(a)
        for layer in self.right:
            b = layer(b)
        return self.head(a + b)


@pytest.mark.parametrize(
    ("blocks", "space"),
    [
        ("left,right", "hidden"),
        ("left,right", "logits"),
        ("left.0,right", "logits"),
        ("left.1,right.1", "hidden"),  # y is an output of the other tower
    ],
)
def test_towers_side_by_side_are_refused(blocks, space):
    model = SideBySide()
    run = GrapeRun(model, GrapeArgumentsMixin(blocks=blocks, feedback_space=space))
    with pytest.raises(RuntimeError, match="was expected to work on h_.*it works on (h_|none of them)"):
        run.start(lambda: model(torch.ones(1, 4)))
    assert count_hooks(model) == 0


class Streams(nn.Module):
    """Several streams of activations in front of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Layer(), Layer(), Layer()]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([x, -x])
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(0))


def test_streams_in_front_of_the_batch_are_refused():
    model = Streams()
    run = GrapeRun(model, GrapeArgumentsMixin(blocks="layers", feedback_space="logits"))
    with pytest.raises(RuntimeError, match=r"the batch as the first dimension .* at y .1., found .2."):
        run.start(lambda: model(torch.ones(1, 3, 4)))


@pytest.mark.parametrize("past_hooks", [False, True])
def test_blocks_that_are_never_called_are_named(past_hooks):
    class Unused(SideBySide):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.left if past_hooks else []:
                x = block.forward(x)
            return self.head(x)

    model = Unused()
    run = GrapeRun(model, GrapeArgumentsMixin(blocks="left"))
    with pytest.raises(RuntimeError, match=r"these blocks \(2 of them, the first a Layer\), or calls their `forward`"):
        run.start(lambda: model(torch.ones(1, 4)))
    assert count_hooks(model) == 0


@pytest.mark.parametrize("way", ["checkpoint", "fx", "teacher"])
def test_blocks_that_run_without_gradients_are_refused_with_the_reason(way):
    class Hidden(SideBySide):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.left:
                x = checkpoint(block, x, use_reentrant=True) if way == "checkpoint" else block(x)
            return self.head(x)

    model: nn.Module = Hidden()
    if way == "fx":
        model = torch.fx.symbolic_trace(model)
    if way == "teacher":
        model.left.requires_grad_(False)
    reason = {
        "checkpoint": r'"use_reentrant": False.*checkpoint\(\.\.\., use_reentrant=False\)',
        "fx": "torch.fx has traced the model.*is_leaf_module",
        "teacher": r"these blocks \(2 of them, the first a Layer\) ran without gradients.*option `blocks`",
    }[way]
    run = GrapeRun(model, GrapeArgumentsMixin(blocks="left"))

    def forward() -> Tensor:
        with torch.set_grad_enabled(way != "teacher"):
            return model(torch.ones(1, 4, requires_grad=True))

    with pytest.raises(RuntimeError, match=reason):
        run.start(forward)
    assert count_hooks(model) == 0


def test_blocks_that_a_forward_does_not_train_are_told_of():
    class Stopped(SideBySide):
        def __init__(self, detached: bool) -> None:
            super().__init__()
            self.detached = detached

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.detached):
                x = self.left[0](x)
            return self.head(self.right(self.left[1](x.detach())) if self.detached else self.left[1](x))

    for model, reason in (
        (Stopped(True), r"works on none of them.*or those behind a `detach`"),
        (Stopped(False), r"in the order \[2\]. Those under `no_grad` are not seen: freeze them instead"),
    ):
        model.right = nn.Sequential(*model.right)
        run = GrapeRun(model, GrapeArgumentsMixin(blocks="left", feedback_space="hidden"))
        with pytest.raises(RuntimeError, match=reason):
            run.start(lambda model=model: model(torch.ones(1, 4)))


class Frames(nn.Module):
    """Convolutions over the frames of each sample, folded into the batch; the head reads their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = x.flatten(0, 1)
        for block in self.blocks:
            h = block(h)
        logits = self.head(h.mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_frames_that_are_folded_into_the_batch(tmp_path):
    """With as many sweeps as points it is backpropagation."""
    rows = [{"x": torch.randn(3, 2, 5, 5), "labels": i % 3} for i in range(8)]
    swept = fitted(Frames, rows, tmp_path, feedback_sweeps=2)
    assert_same(swept, fitted(Frames, rows, tmp_path, Trainer), rtol=1e-5, atol=1e-6)
    args = arguments(tmp_path, max_steps=1, feedback_space="logits")
    trainer = GrapeTrainer(Frames(), args, train_dataset=rows)
    with pytest.raises(RuntimeError, match='the batch as the first dimension.* use feedback_space="hidden"'):
        trainer.train()
