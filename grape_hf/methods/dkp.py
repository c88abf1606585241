r"""Direct Kolen-Pollack: DFA whose matrices learn like forward weights from h_l to y.

Webster, Choi & Ahn, *Learning the connections in direct feedback alignment* (2021). Kolen and Pollack (1994) noticed
that a backward matrix which gets the same increments as the forward weight, and the same decay, forgets where the two
started and becomes its transpose. DKP does so with the direct connections of DFA: as a weight from h_l straight to y
would get the gradient :math:`\sum_i e_i h_{l,i}^\top`,

.. math:: B_l \leftarrow B_l - \eta \left(\sum_i h_{l,i} e_i^\top + \lambda B_l\right), \qquad \delta_l = B_l e.

The sum runs over samples and positions; e = dLoss/dy is of the loss that is backpropagated, the mean over the batch, so
1 / N is in it. eta is the weights' learning rate of the step times ``feedback_lr`` (1 here, as Kolen-Pollack asks for),
lambda is ``weight_decay``. With SGD without momentum, one hidden layer and a linear read-out, B_l - W^T shrinks by
1 - eta lambda in each step.

Departures: the authors' code (github.com/webstah/dkp-gist) trains B_l by an Adam of its own (rate 1e-4, decay 1e-6) and
draws it by He's rule; ours is the plain step of the equation, from DFA's gaussian start (``initial_feedback``). With
Adam on the weights, whose steps have another size, tune ``feedback_lr``. Option values that are given win.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grape_hf.core.broadcast import Keep
from grape_hf.core.layout import SAME
from grape_hf.core.modes import Forward
from grape_hf.engine.ranks import Ranks


@torch.no_grad()
def products(forwards: Sequence[Forward], B: Sequence[Tensor]) -> list[Tensor]:
    """Return sum_i h_l,i e_i^T of each boundary, ``(n_l, n_y)``, over forwards whose backward has run.

    Where y has other positions than h_l, a sample's e is summed over positions and goes with each position of h_l.

    Args:
        forwards: what ``Boundaries.broadcast`` kept: h and e.
        B: the feedback matrices, for shapes and dtypes.
    """
    sums = [torch.zeros_like(b) for b in B]
    for forward in forwards:
        if (error := forward.e) is None:
            continue
        for index, h in forward.h.items():
            pairing = forward.pairings.get(index, SAME)
            h = pairing.unpadded(pairing.layout.vectors(h.detach()).to(sums[index]))
            e = pairing.align(pairing.layout.vectors(error).to(h), h.shape[1])
            h = h if e.shape[1] == h.shape[1] else h.sum(1, keepdim=True)
            sums[index] += h.flatten(0, 1).mT @ e.flatten(0, 1)
    return sums


def refine(B: Tensor, product: Tensor, rate: float, decay: float) -> Tensor:
    """Take the step of a weight with gradient ``product`` and weight decay: B - rate * (product + decay * B)."""
    return B - rate * (product + decay * B)


class DirectKolenPollack:
    """The rule of the equation above, for a run.

    Args:
        multiple: of the weights' learning rate, ``feedback_lr``.
    """

    keep: Keep = "h and e"

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple
        self._sums: list[Tensor] = []

    def begin(self) -> None:
        """Begin an optimiser step."""
        self._sums = []

    def observe(self, forwards: Sequence[Forward], B: Sequence[Tensor]) -> None:
        """Add sum_i h_l,i e_i^T of a micro-batch's forwards, after their backward."""
        found = products(forwards, B)
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def refined(self, B: Sequence[Tensor], ranks: Ranks, rate: float, decay: float) -> list[Tensor] | None:
        """Return the matrices after the step of weights with learning rate ``rate`` and weight decay ``decay``."""
        if not self._sums:
            return None
        means = [g / ranks.count for g in ranks.total(self._sums)]  # as of all gradients
        return [refine(b, g, rate * self.multiple, decay) for b, g in zip(B, means, strict=True)]
