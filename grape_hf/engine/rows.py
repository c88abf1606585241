"""Which rows of activations belong to which sample, by the gradient of one row of the head's output."""

import torch
from torch import Tensor, nn

from grape_hf.core.backward_effects import gradients_aside
from grape_hf.core.isolation import isolated


def is_turned(model: nn.Module, h: Tensor, y: Tensor) -> bool:
    """Whether h is ``(positions, batch, n)`` beside ``(batch, ...)``, where there are as many of both."""
    if h.ndim != 3 or h.shape[0] != h.shape[1] or len(h) == 1 or h.shape == y.shape:
        return False
    reached = _reached_by_first(model, h, y)
    if reached is None:
        return False
    by_row, by_column = (reached.any(-1).any(dim) for dim in (1, 0))
    return bool(by_row[1:].any()) and not bool(by_column[1:].any())


def is_folded(model: nn.Module, h: Tensor, y: Tensor) -> bool:
    """Whether h has several rows for each sample, one sample after the other: frames of a video, a bag of images.

    The first row of y is made of the first of them alone then. Where blocks stack streams of one sample, it is made of
    all.
    """
    if len(y) < 2 or len(h) % len(y):
        return False
    reached = _reached_by_first(model, h, y)
    if reached is None:
        return False
    by_row, each = reached.flatten(1).any(1), len(h) // len(y)
    return bool(by_row[:each].any()) and not bool(by_row[each:].any())


def _reached_by_first(model: nn.Module, h: Tensor, y: Tensor) -> Tensor | None:
    """Where h has a part in the first row of y; None if that cannot be told."""
    if h.is_meta or not y.requires_grad:
        return None
    with isolated(model, False), gradients_aside(list(model.parameters())):  # a checkpointed head runs again
        (gradient,) = torch.autograd.grad(y[0].sum(), h, retain_graph=True, allow_unused=True)
    return None if gradient is None else gradient.ne(0)
