"""Which rows of activations belong to which sample, by the gradient of one row of the head's output."""

import torch
from torch import Tensor


def is_turned(h: Tensor, y: Tensor) -> bool:
    """Whether h is ``(positions, batch, n)`` beside ``(batch, ...)``, where there are as many of both."""
    if h.ndim != 3 or h.shape[0] != h.shape[1] or len(h) == 1 or h.is_meta or not y.requires_grad or h.shape == y.shape:
        return False
    (of_first,) = torch.autograd.grad(y[0].sum(), h, retain_graph=True, allow_unused=True)
    if of_first is None:
        return False
    by_row, by_column = (of_first.ne(0).any(-1).any(dim) for dim in (1, 0))
    return bool(by_row[1:].any()) and not bool(by_column[1:].any())


def is_folded(h: Tensor, y: Tensor | None) -> bool:
    """Whether h has several rows for each sample, one sample after the other: frames of a video, a bag of images.

    The first row of y is made of the first of them alone then. Where blocks stack streams of one sample, it is made of
    all.
    """
    if y is None or len(y) < 2 or len(h) % len(y) or not y.requires_grad or h.is_meta:
        return False
    (of_first,) = torch.autograd.grad(y[0].sum(), h, retain_graph=True, allow_unused=True)
    if of_first is None:
        return False
    reached, each = of_first.flatten(1).ne(0).any(1), len(h) // len(y)
    return bool(reached[:each].any()) and not bool(reached[each:].any())
