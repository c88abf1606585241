"""What a backward shows of a head whose output is y: does all that the loss wants of h_L come by way of y?

Direct feedback measures the error at y, and pairs row i of y with sample i of every h_l. A backward of the head alone
shows whether both may be done. It costs as much as the head's part of the step, so that few steps have one.
"""

import torch
from torch import Tensor


class HeadCheck:
    """The check of one forward.

    Args:
        last: h_L as its block made it; None if the backward of the head is not to be looked at.
    """

    def __init__(self, last: Tensor | None) -> None:
        self._last = last
        self._by_y: Tensor | None = None  # what y sends to h_L
        self._sent = False

    @property
    def looks(self) -> bool:
        """Whether ``send`` needs y with its graph."""
        return self._last is not None

    def send(self, y: Tensor | None, e: Tensor) -> None:
        """Note what e, the error at y, sends to h_L.

        Raises:
            RuntimeError: if a row of y was made of another sample than its number says.
        """
        last, self._last, self._sent = self._last, None, True
        if last is None or y is None:
            return
        (self._by_y,) = torch.autograd.grad(y, last, e, retain_graph=True, allow_unused=True)
        if self._by_y is None or len(self._by_y) != len(e):
            return
        reached = _rows(self._by_y)
        for row in (_rows(e) & ~reached.to(e.device)).nonzero().flatten()[:1]:
            # A head may send a sample nothing, as where no unit of a ReLU is on. Does this row send to another?
            alone = torch.zeros_like(e).index_copy_(0, row[None], e[row][None])
            (by_row,) = torch.autograd.grad(y, last, alone, retain_graph=True)
            if _rows(by_row).any():
                raise RuntimeError(
                    f"row {int(row)} of the head's output was made of another sample than sample {int(row)}. A head "
                    "that runs on chosen tokens alone has rows of its own, and their errors would go to other samples. "
                    'Use feedback_space="hidden".'
                )

    def arrived(self, gradient: Tensor) -> None:
        """Raise RuntimeError if the gradient at h_L does not all come by way of y."""
        if self._sent and self._by_y is None:
            return
        by_y, self._by_y = self._by_y, None
        # Two backwards of the same operations agree to rounding. Where fp16 overflows nothing can be said.
        if by_y is None or torch.dist(gradient, by_y) > 0.01 * torch.linalg.vector_norm(gradient):
            raise RuntimeError(
                "the loss reads the output of the last block beside the head (a loss on hidden states, features kept "
                "by a hook, several heads), and the error is measured at the head's output: what comes from there "
                'would not reach the other blocks. Use feedback_space="hidden".'
            )


def _rows(gradient: Tensor) -> Tensor:
    """Return of which samples a gradient is not zero everywhere, ``(batch,)``."""
    return gradient.reshape(len(gradient), -1).any(1)
