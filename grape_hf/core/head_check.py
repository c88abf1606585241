"""What a backward shows of a head whose output is y: does all that the loss wants of h_L come by way of y?

Direct feedback measures the error at y, and pairs row i of y with sample i of every h_l, and position s with position
s. A backward of the head alone shows whether that may be done. It costs as much as the head's part of the step, so that
few steps have one.
"""

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from grape_hf.core.layout import AUTO, Layout


class HeadCheck:
    """The check of one forward.

    Args:
        last: h_L, where the head reads it; None if the backward of the head is not to be looked at.
        layout: how h_L and y are seen as vectors.
        paired: whether positions are paired, where y has as many as h_L.
    """

    def __init__(self, last: GradientEdge | None, layout: Layout = AUTO, paired: bool = True) -> None:
        self._last, self._layout, self._paired = last, layout, paired
        self._by_y: Tensor | None = None  # what y sends to h_L
        self._sent = False

    @property
    def looks(self) -> bool:
        """Whether ``send`` needs y with its graph."""
        return self._last is not None

    def send(self, y: Tensor | None, e: Tensor) -> None:
        """Note what e, the error at y, sends to h_L.

        Raises:
            RuntimeError: if a row of y was made of another sample than its number says, or a vector of other positions.
        """
        last, self._last, self._sent = self._last, None, True
        if last is None or y is None:
            return
        (self._by_y,) = torch.autograd.grad(y, last, e, retain_graph=True, allow_unused=True)
        if self._by_y is None or len(self._by_y) != len(e):
            return
        there, reached = self._positions(e), self._positions(self._by_y)
        for row in (there.any(1) & ~reached.any(1).to(there.device)).nonzero().flatten()[:1].tolist():
            # A head may send a sample nothing, as where no unit of a ReLU is on. Does this row send to another?
            if self._reached_by(row, slice(None), y, last, e).any():
                raise RuntimeError(
                    f"row {row} of the head's output was made of another sample than sample {row}. A head "
                    "that runs on chosen tokens alone has rows of its own, and their errors would go to other samples. "
                    'Use feedback_space="hidden".'
                )
        if self._paired and there.shape == reached.shape and there.shape[1] > 1:
            for row, position in there.nonzero()[:1].tolist():
                found = self._reached_by(row, position, y, last, e)[row]
                found[position] = False
                if found.any():
                    raise RuntimeError(
                        f"position {position} of the head's output was made of other positions of the last "
                        'block\'s, and errors would be paired by position. Use feedback_space="hidden".'
                    )

    def _positions(self, gradient: Tensor) -> Tensor:
        """Return where a gradient is not zero, ``(batch, positions)``."""
        return self._layout.vectors(gradient).ne(0).any(-1)

    def _reached_by(self, row: int, position: int | slice, y: Tensor, last: GradientEdge, e: Tensor) -> Tensor:
        """Return where one row of e, or one position of it, arrives, ``(batch, positions)``."""
        vectors = self._layout.vectors(e)
        alone = torch.zeros_like(vectors)
        alone[row, position] = vectors[row, position]
        (found,) = torch.autograd.grad(y, last, self._layout.restore(alone, e.shape), retain_graph=True)
        return self._positions(found)

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
