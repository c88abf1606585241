"""What the tests of the baselines train: small convolutional networks on scikit-learn's digits, 8 x 8 pixels."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from problems import Problem
from sklearn.datasets import load_digits
from torch import Tensor, nn

CHANCE = 2.302585  # ln 10: the loss of whoever knows nothing but that there are ten classes
_DIGITS = load_digits()
_PIXELS, _LABELS = torch.tensor(_DIGITS.images / 8 - 1), torch.tensor(_DIGITS.target)


def digit(generator: torch.Generator) -> dict[str, Tensor]:
    i = int(torch.randint(len(_LABELS), (1,), generator=generator))
    return {"pixel_values": _PIXELS[i, None].float(), "labels": _LABELS[i]}


def batch(number: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The first digits."""
    return {"pixel_values": _PIXELS[:number, None].to(dtype), "labels": _LABELS[:number]}


class ConvNet(nn.Module):
    """Blocks, head and loss of an image classifier."""

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.fc = nn.ModuleList(blocks), head

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = pixel_values
        for block in self.blocks:
            h = block(h)
        logits = self.fc(h.flatten(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def plain_net(activation: Callable[..., nn.Module] = nn.ReLU) -> ConvNet:
    blocks = [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), activation(), nn.MaxPool2d(2)),  # (4, 4, 4)
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), activation()),  # (6, 1, 1)
        nn.Sequential(nn.Flatten(), nn.Linear(6, 8), activation()),
    ]
    return ConvNet(blocks, nn.Linear(8, 10))


def small_net() -> ConvNet:
    """A network of few weights, for statistics."""
    blocks = [nn.Sequential(nn.Conv2d(1, 2, 5, stride=3), nn.Tanh()), nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh())]
    return ConvNet(blocks, nn.Linear(3, 10))


def odd_net() -> ConvNet:
    """Every way to call a convolution, batch norms, in-place activations, a transposed convolution."""
    blocks = [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="circular"), nn.Tanh()),
        nn.Sequential(nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False), nn.BatchNorm2d(2), nn.GELU()),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.AvgPool2d(2)),
    ]
    return ConvNet(blocks, nn.Linear(64, 10))


def deep_net() -> ConvNet:
    """What the Trainer trains: wide enough to learn something in some dozens of steps."""
    blocks = [
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()),
    ]
    return ConvNet(blocks, nn.Linear(32, 10))


def shallow_net() -> ConvNet:
    """For methods that get worse with depth."""
    conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    return ConvNet([conv, nn.Sequential(nn.Flatten(), nn.Linear(72, 32), nn.ReLU())], nn.Linear(32, 10))


def tiny_net() -> ConvNet:
    """For a method that gets worse with the number of weights."""
    return ConvNet([nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Tanh())], nn.Linear(8, 10))


DIGITS = Problem("digits", deep_net, digit)
SHALLOW = Problem("digits-shallow", shallow_net, digit)
TINY = Problem("digits-tiny", tiny_net, digit)
