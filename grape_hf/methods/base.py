"""What the baselines share: the protocol, seeded draws, and a way to see the layers of a model at work.

A layer is a call of ``F.linear``, of a convolution or, for GPT-2's transposed ``Conv1D``, of ``torch.addmm`` whose
weight is a parameter. It is met by a ``TorchFunctionMode`` while the model runs, so no module is wrapped and no
``forward`` replaced.
"""

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grape_hf.engine.step import MicroBatch


class Baseline(Protocol):
    """A way to train a model, ready to enclose the stock training step."""

    def step(self, batch: MicroBatch) -> AbstractContextManager[None]:
        """Enclose the forward and backward of one micro-batch, after which gradients are in ``p.grad``."""


class BaselineEngine:
    """The stock step inside a baseline's.

    Args:
        baseline: the baseline.
    """

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline

    def take(self, batch: MicroBatch, stock: Callable[[], Tensor]) -> Tensor:
        """Take the step; see ``Engine``."""
        with self.baseline.step(batch):
            return stock()

    def close(self) -> None:
        """Outside a step the model is untouched."""


def seeded(seed: int, *key: int | str) -> torch.Generator:
    """Return a generator on the CPU that depends on (seed, key) alone, the same on every device and in every run."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    state = np.random.SeedSequence((seed, *numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        x: its input.
        weight: its weight.
        run: the layer itself, bias and all, on another input.
        product: the product of an input and another weight of the same shape, without bias: linear in both.
    """

    x: Tensor
    weight: Tensor
    run: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def layer_call(func: Any, args: tuple, kwargs: dict[str, Any]) -> LayerCall | None:
    """Read a call that a ``TorchFunctionMode`` met, None if it is not of a layer."""
    if func is torch.addmm and len(args) == 3 and not kwargs:
        bias, x, weight = args
        return LayerCall(x, weight, lambda x: torch.addmm(bias, x, weight), torch.mm)
    if func is not F.linear and func not in _CONVOLUTIONS:
        return None
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
    more = args[3:]
    return LayerCall(
        x,
        weight,
        lambda x: func(x, weight, bias, *more, **named),
        lambda x, w: func(x, w, None, *more, **named),
    )


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Name the parameters of ``model`` by their ``id``; a tied one has its first name."""
    return {id(p): name for name, p in model.named_parameters()}
