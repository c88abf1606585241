"""Where activations have their channels: the same network learns the same, wherever its blocks have them.

The oracle is a network with linear layers, (batch, positions, channels) between its blocks. A convolution of one
position is such a layer.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, weights
from torch import Tensor, nn

from grape_hf import GrapeTrainer
from grape_hf.core.layout import channels_of

CHANNELS, POSITIONS, SAMPLES = 6, 4, 8


class Block(nn.Module):
    """A residual block; ``layer`` makes its two layers."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.up, self.down = layer(CHANNELS, 2 * CHANNELS), layer(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """Blocks that see their positions in ``shape``, with channels behind the batch or in the last dimension.

    Args:
        shape: of positions.
        first: whether channels are behind the batch.
        pooled: whether there is one label for a sample.
        head: whether a module makes the logits that the package finds.
    """

    def __init__(self, shape: tuple[int, ...], first: bool, pooled: bool, head: bool = True) -> None:
        super().__init__()
        self.shape, self.first, self.pooled = shape, first, pooled
        convolution: Any = nn.Conv1d if len(shape) == 1 else nn.Conv2d
        self.stem = nn.Linear(3, CHANNELS)
        self.layers = nn.ModuleList(
            Block((lambda n, m: convolution(n, m, 1)) if first else nn.Linear) for _ in range(4)
        )
        setattr(self, "classifier" if head else "last", nn.Linear(CHANNELS, 5))

    def forward(
        self, x: Tensor, labels: Tensor, attention_mask: Tensor | None = None, ignored_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        h = self.stem(x).unflatten(1, self.shape)
        h = h.movedim(-1, 1) if self.first else h
        for layer in self.layers:
            h = layer(h)
        h = (h.movedim(1, -1) if self.first else h).flatten(1, -2)
        if ignored_mask is not None:
            attention_mask = 1 - ignored_mask
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        logits = (self.classifier if hasattr(self, "classifier") else self.last)(h.mean(1) if self.pooled else h)
        return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


def samples(positions: int, pooled: bool, padded: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(SAMPLES):
        x = torch.randn(positions, 3, generator=generator)
        labels = torch.randint(5, () if pooled else (positions,), generator=generator)
        mask = {"attention_mask": (torch.arange(positions) < positions - number % 3).long()} if padded else {}
        found.append({"x": x, "labels": labels} | mask)
    return found


def trained(folder: Path, model: Network, data: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    """Train for some steps; return weights and matrices, the weights of convolutions as those of linear layers."""
    torch.manual_seed(0)
    drawn = Network(model.shape, False, model.pooled, hasattr(model, "classifier")).state_dict()
    model.load_state_dict({name: drawn[name].reshape(p.shape) for name, p in model.state_dict().items()})
    options = {"optim": "sgd", "learning_rate": 0.1, "feedback_lr": 0.1, "max_steps": 3} | options
    trainer = GrapeTrainer(model, arguments(folder, **options), train_dataset=data)
    trainer.train()
    return {name: p.reshape(drawn[name].shape) if name in drawn else p for name, p in weights(trainer).items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "local": {},
    "gaussian": {"feedback_init": "gaussian"},
    "sweep": {"feedback_sweeps": 1},
    "path": {"feedback_path": "shortcut"},
    "lms": {"feedback_rule": "lms"},
    "block": {"feedback_rule": "lms", "jvp_scope": "block"},
    "paper": {"grape_preset": "paper", "calibration_strategy": "no"},
    "none": {"feedback_sharing": "none"},
    "dfa": {"method": "dfa"},
    "dkp": {"method": "dkp"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", ["tokens", "padded", "pooled", "pooled and padded"])
def test_one_dimensional_convolutions(case: str, name: str, tmp_path: Path):
    pooled, padded = "pooled" in case, "padded" in case
    data = samples(POSITIONS, pooled, padded)
    options = {"feedback_space": "hidden"} | OPTIONS[name]
    if name == "none":  # the vectors of whole samples are in another order
        first = trained(tmp_path, Network((POSITIONS,), True, pooled), data, **options)
        assert all(p.isfinite().all() for p in first.values())
        return
    last, first = (trained(tmp_path, Network((POSITIONS,), first, pooled), data, **options) for first in (False, True))
    assert_same(first, last, rtol=1e-4, atol=1e-5)
    start = trained(tmp_path, Network((POSITIONS,), False, pooled), data, **options | {"learning_rate": 0.0})
    assert all(not torch.equal(start[name], p) for name, p in last.items() if name.startswith("layers"))


def test_what_a_mask_says_is_learned_behind_the_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A mask that is 1 at padding trains as one that is 0 there, and is no mask that fits nothing."""
    data = samples(CHANNELS + 2, True, True)
    turned = [{n: t for n, t in s.items() if "mask" not in n} | {"ignored_mask": 1 - s["attention_mask"]} for s in data]
    expected, got = (trained(tmp_path, Network((CHANNELS + 2,), True, True), given) for given in (data, turned))
    assert_same(got, expected)
    assert "mask" not in caplog.text


@pytest.mark.parametrize("sharing", ["position", "grid"])
@pytest.mark.parametrize("name", ["local", "gaussian", "sweep", "lms"])
def test_linear_layers_on_maps(name: str, sharing: str, tmp_path: Path):
    """(batch, H, W, C) and (batch, C, H, W) are the same maps; a square has rows as long as its channels, too."""
    options = {"feedback_sharing": sharing} | OPTIONS[name]
    for shape in ((2, 2), (CHANNELS, CHANNELS)):
        data = samples(shape[0] * shape[1], True, False)
        last, first = (trained(tmp_path, Network(shape, first, True), data, **options) for first in (False, True))
        assert_same(first, last, rtol=1e-4, atol=1e-5)


def test_lengths_that_vary(tmp_path: Path):
    data = [*samples(6, True, False)[:4], *samples(4, True, False)[:4]]
    options = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "max_steps": 2}

    class Any1d(Network):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            self.shape = (x.shape[1],)
            return super().forward(x, labels)

    last, first = (trained(tmp_path, Any1d((1,), first, True), data, **options) for first in (False, True))
    assert_same(first, last, rtol=1e-4, atol=1e-5)


def test_logits_in_another_order_than_the_blocks_channels(tmp_path: Path):
    """There the error is measured at the last block."""
    data = samples(POSITIONS, False, False)
    chosen, hidden = (
        trained(tmp_path, Network((POSITIONS,), True, False), data, feedback_space=s) for s in ("auto", "hidden")
    )
    assert_same(chosen, hidden, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"makes, \(batch, positions, classes\).*\(batch, channels, positions\)"):
        trained(tmp_path, Network((POSITIONS,), True, False), data, feedback_space="logits")


def test_who_makes_the_channels():
    class Conformer(nn.Module):
        """Attention's layers and a convolution along the positions."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(6), nn.Conv1d(6, 6, 3)

    def mixer(tokens: int) -> nn.Module:
        """A convolution whose channels are positions, as in gMLP."""
        return nn.Sequential(nn.Linear(6, 6), nn.Conv1d(tokens, tokens, 1))

    conv1, conv2 = nn.Conv1d(6, 6, 3), nn.Conv2d(6, 6, 3)
    three, four = torch.Size((2, 6, 8)), torch.Size((2, 6, 8, 8))
    square = torch.Size((2, 6, 6))
    assert channels_of([(conv1, three)] * 2) == (True, False)
    assert channels_of([(conv1, square)]) == (True, False)
    for block, shape in product((Conformer(), mixer(8), nn.Linear(6, 6)), (torch.Size((2, 8, 6)), square)):
        assert channels_of([(block, shape)]) == (False, False)
    assert channels_of([(conv1, three), (nn.Linear(8, 8), three)]) == (False, False)
    assert channels_of([(conv2, four)]) == (False, False)
    assert channels_of([(nn.Linear(8, 8), four)] * 2) == (False, True)
    # ConvNeXt's blocks have both, and maps with as many columns as channels say nothing.
    assert channels_of([(nn.Sequential(conv2, nn.Linear(24, 6)), torch.Size((2, 6, 6, 6)))]) == (False, False)
    assert channels_of([(conv1, three), (nn.Linear(6, 6), torch.Size((2, 6)))]) == (True, False)
