"""What a training step is, for whoever does it: the small interface between the Trainer and the engines.

The Trainer hands each micro-batch, with its own stock step, to an ``Engine``. The star of one process is one
(``star_engine.py``); the baselines are others, and so are stages of a pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from grape_hf.core.broadcast import Keep
from grape_hf.core.modes import Forward
from grape_hf.engine.ranks import Ranks


@dataclass(frozen=True)
class MicroBatch:
    """Which part of the training a forward and backward are.

    Args:
        step: the optimiser step.
        places: the samples' places in the global batch.
        parts: number of micro-batches in the optimiser step, which are taken to be of one size; the loss that is
            backpropagated is the mean over samples, divided by it.
        last: whether the optimiser acts on the gradients after it.
        inputs: what the Trainer was handed.
        loss: computes the loss of such inputs again, as the Trainer does.
        rate: learning rate of the weights.
        decay: weight decay of the weights.
    """

    step: int
    places: Sequence[int]
    parts: int = 1
    last: bool = True
    inputs: Any = None
    loss: Callable[[Any], Tensor] | None = None
    rate: float = 0.0
    decay: float = 0.0


class Engine(Protocol):
    """A way to take the training step."""

    def take(self, batch: MicroBatch, stock: Callable[[], Tensor]) -> Tensor:
        """Take the step on one micro-batch, after which gradients are in ``p.grad``, and return the loss.

        Args:
            batch: the micro-batch.
            stock: the Trainer's own step: forward, loss, backward.
        """

    def close(self) -> None:
        """Leave the model as it was."""


class BackwardRule(Protocol):
    """A rule by which the matrices learn from what the step's own backward leaves, in place of estimates.

    Attributes:
        keep: what it needs of each forward.
    """

    keep: Keep

    def begin(self) -> None:
        """Begin an optimiser step."""

    def observe(self, forwards: Sequence[Forward], B: Sequence[Tensor]) -> None:
        """Take in the forwards of one micro-batch, after their backward."""

    def refined(self, B: Sequence[Tensor], ranks: Ranks, rate: float, decay: float) -> list[Tensor] | None:
        """Return the matrices after the step, None if nothing was seen; rate and decay are those of the weights."""
