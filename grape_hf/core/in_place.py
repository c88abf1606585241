"""Cuts in a tensor itself, for models that add up their residuals outside of blocks.

Where a model's own forward adds what a block makes to what the block was given (``x = x + block(x)``), h_l is the sum.
The next block reads it, and so does the next sum, which no hook sees. So the graph is not cut at an argument of the
next block alone: the tensor itself becomes another, for all who read it from then on.
"""

from typing import Any

import torch
from torch import Tensor

from grape_hf.core.graph import Mark

ADVICE = (
    "Where a model adds what a block makes to what the block was given, in a forward of its own (x = x + block(x)), "
    "write a module that does both, and name these modules with the option `blocks`."
)


class _Replace(torch.autograd.Function):
    """Return h, which has no graph, with that of ``new``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, new: Tensor) -> Tensor:
        """Return h."""
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """Hand the gradient on to ``new``."""
        return None, gradient


def as_made(h: Tensor) -> Tensor:
    """Return h with the graph that it has now, which ``replace`` leaves as it is; without gradients h itself."""
    return Mark.apply(h, None) if torch.is_grad_enabled() else h


def replace(h: Tensor, new: Tensor) -> None:
    """Have all who read h from now on read ``new`` in its place.

    Args:
        h: what the model holds.
        new: of the same shape. With gradients enabled it has the same numbers, and no graph or one of its own; else it
            may have any numbers, and a tangent.

    Raises:
        RuntimeError: if h is a view of another tensor, which cannot become another without it.
    """
    if not torch.is_grad_enabled():
        if h.dtype == new.dtype:
            h.copy_(new)  # with its tangent
        else:  # a finite difference must not be rounded
            h.data = new
        return
    if h._is_view():
        raise RuntimeError(
            f"expected the residual sum that blocks read, {tuple(h.shape)}, to be a tensor of its own, got a view of "
            f"another. {ADVICE}"
        )
    h.detach_()
    if new.requires_grad:
        # The numbers stay what they are: a checkpoint around the next block may have saved h already.
        with torch.autograd._unsafe_preserve_version_counter(h):
            _Replace.apply(h, new)


def whole_of(t: Tensor) -> Tensor:
    """Return the tensor of the same samples that t is a part of (``x[:, 0]``, ``x.flatten(1)``), or t itself."""
    base = t._base
    return t if base is None or base.ndim < t.ndim or len(base) != len(t) else base


def part_of(whole: Tensor, t: Tensor) -> Tensor:
    """Return of ``whole``, which lies where ``whole_of(t)`` does, what t is of that."""
    return whole.as_strided(t.size(), t.stride(), t.storage_offset())
