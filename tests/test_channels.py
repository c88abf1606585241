"""Where activations have their channels: the same network learns the same, wherever its blocks have them.

The oracle is a network with linear layers, (batch, positions, channels) between its blocks. A convolution of one
position is such a layer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import arguments, assert_same, weights
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

from grape_hf import GrapeTrainer
from grape_hf.core.channels import Channels

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
    "lms": {"feedback_rule": "lms", "jvp_mode": "dual"},  # differences would round otherwise in the two
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


def test_a_convolution_as_head_of_tokens(tmp_path: Path):
    """Its logits are (batch, classes, positions), also where there are fewer positions than channels."""

    class Tagger(Network):
        def __init__(self) -> None:
            super().__init__((POSITIONS,), False, False)
            self.classifier = nn.Conv1d(CHANNELS, 5, 1)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            h = self.stem(x)
            for layer in self.layers:
                h = layer(h)
            logits = self.classifier(h.mT)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    data = samples(POSITIONS, False, False)
    by_layer = trained(tmp_path, Network((POSITIONS,), False, False), data, feedback_space="hidden")
    assert_same(trained(tmp_path, Tagger(), data), by_layer, rtol=1e-4, atol=1e-5)


def test_logits_in_another_order_than_the_blocks_channels(tmp_path: Path):
    """There the error is measured at the last block."""
    data = samples(POSITIONS, False, False)
    chosen, hidden = (
        trained(tmp_path, Network((POSITIONS,), True, False), data, feedback_space=s) for s in ("auto", "hidden")
    )
    assert_same(chosen, hidden, rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"\(batch, positions, channels\) of the one.*\(batch, channels, positions\) of"
    ):
        trained(tmp_path, Network((POSITIONS,), True, False), data, feedback_space="logits")


class Conformer(nn.Module):
    """Attention's layers and a convolution along the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(6), nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).mT).mT


class ConvNext(nn.Module):
    """A convolution along the positions, and then layers on channels in the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.layer = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(self.conv(x).mT)).mT


class Excited(nn.Module):
    """A convolution whose channels are weighed by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.layer(x.mean(-1)))[..., None]


class Gated(nn.Module):
    """Twice as many channels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.glu(self.conv(x), dim=1)


class Half(nn.Module):
    """A convolution on half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([a, self.conv(b)], dim=1)


class Mixer(nn.Module):
    """A convolution whose channels are positions, as in gMLP."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(6, 6), nn.Conv1d(positions, positions, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.layer(x))


class NextLast(nn.Module):
    """ConvNeXt's block on (batch, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.conv = nn.LayerNorm(6), nn.Linear(6, 6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.layer(self.norm(x)).movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("positions", [8, CHANNELS])
def test_who_makes_the_channels(positions: int):
    def found(*blocks: nn.Module, first: bool, sides: int = 1) -> tuple[bool, bool]:
        shape = [positions] * sides
        x = torch.randn(2, CHANNELS, *shape) if first else torch.randn(2, *shape, CHANNELS)
        channels, read = Channels(blocks), {}
        with channels.watched():
            for index, block in enumerate(blocks):
                read[index] = x.shape
                x = block(x)
        assert all(not block._forward_pre_hooks for block in nn.ModuleList(blocks).modules())
        return channels.found(read)

    for kind in (ConvNext, Excited, Gated, Half, lambda: nn.Conv1d(6, 6, 3, padding=1), lambda: nn.GroupNorm(2, 6)):
        assert found(kind(), kind(), first=True) == (True, False), kind
    for block in (
        Conformer(),
        Mixer(positions),
        nn.Linear(6, 6),
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
    ):
        assert found(block, block, first=False) == (False, False), block
    # Where blocks have no module that tells, the others do.
    assert found(nn.GELU(), nn.Conv1d(6, 6, 1), nn.Tanh(), first=True) == (True, False)
    assert found(nn.GELU(), nn.Tanh(), first=True) == (False, False)
    assert found(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), first=True, sides=2) == (False, False)
    assert found(NextLast(), NextLast(), first=False, sides=2) == (False, True)
    assert found(nn.Conv3d(6, 6, 1), first=True, sides=3) == (False, False)
    assert found(nn.Linear(6, 6), first=False, sides=3) == (False, True)


def test_layer_norms_of_maps_have_their_channels_behind_the_batch():
    block = timm.create_model("convnext_atto").stages[1].blocks[0]
    norm = nn.Sequential(timm.layers.LayerNorm2d(80), nn.Conv2d(80, 80, 1))
    x = torch.randn(2, 80, 8, 8)
    for blocks in ([block], [norm]):
        channels = Channels(blocks)
        with channels.watched():
            blocks[0](x)
        assert channels.found({0: x.shape}) == (False, False)


def test_series_that_are_folded_into_the_batch_inside_a_block(tmp_path: Path):
    """Blocks hand on (batch, series, patches, channels), and all modules in them run on another view of it."""
    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, prediction_length=4,
        num_hidden_layers=3, d_model=12, num_attention_heads=2, ffn_dim=12,
    )  # fmt: skip
    data = [{"past_values": torch.randn(16, 2), "future_values": torch.randn(4, 2)} for _ in range(8)]
    options = dict(feedback_sharing="position", max_steps=1, label_names=["future_values"])
    trainer = GrapeTrainer(PatchTSTForPrediction(config), arguments(tmp_path, **options), train_dataset=data)
    trainer.train()
    assert {b.shape for b in trainer.feedback} == {(12, 12)}
