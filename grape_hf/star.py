r"""The autograd nodes of the star: the error e, put in at y, comes out at each h_l as :math:`\delta_l = B_l e`.

Two nodes share a ``Star``. ``Broadcast`` stands at y, and its backward puts e in; ``Receive`` stands behind each h_l,
and its backward takes e out, projected. Between them there is no path but a scalar that tells autograd the order.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grape_hf.layout import AUTO, Layout, align_positions

Matrix = Tensor | Literal["identity"]


def project_error(
    e: Tensor,
    B: Matrix,
    h_shape: torch.Size,
    mask: Tensor | None = None,
    layout: Layout = AUTO,
    pooled: bool = False,
) -> Tensor:
    r"""Return delta_l = B_l e for every position of h_l.

    Args:
        e: dLoss/dy in the shape of y.
        B: feedback matrix, ``(n_l, n_y)``, or "identity". The product is computed in the dtype of e.
        h_shape: shape of h_l, which is the shape of the result.
        mask: ``(batch, positions)``, nonzero where a position is not padding; needed only where one error per sample
            goes to several positions.
        layout: how h_l and e are seen as vectors.
        pooled: whether h_l is of another sequence than e, so that e is summed over positions in any case.
    """
    e = layout.vectors(e)
    n_l = e.shape[-1] if isinstance(B, str) else B.shape[0]
    batch, positions = h_shape[0], h_shape.numel() // (h_shape[0] * n_l)
    e = align_positions(e, positions, pooled)
    delta = e if isinstance(B, str) else e.to(B.device) @ B.mT.to(e.dtype)  # (batch, positions or 1, n_l)
    if delta.shape[1] != positions:
        delta = delta.expand(batch, positions, n_l)
        if mask is not None and mask.shape == (batch, positions):
            delta = delta * mask.to(delta)[..., None]
    return layout.restore(delta, h_shape)


def own_mask(mask: Tensor | None, index: int, pooled: frozenset[int]) -> Tensor | None:
    """Return the padding mask for one boundary: an encoder's says nothing about the positions of its decoder."""
    return mask if index in pooled or not pooled else None


class Star:
    """Where the error of one forward waits for the blocks: the node at y puts it in, the nodes at each h_l read it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.e: Tensor | None = None


class Receive(torch.autograd.Function):
    """Stand between h_l and the error: backward turns e into delta_l, when block l's turn comes and not before.

    Forward returns a scalar stand-in, by which ``Broadcast`` knows this node. As the node is made right after
    block l, autograd runs it right before block l's backward: one delta_l at a time is in memory, whatever the depth.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, B: Matrix, star: Star, mask: Tensor | None, pooled: bool) -> Tensor:
        """Return the stand-in."""
        ctx.B, ctx.star, ctx.mask, ctx.pooled = B, star, mask, pooled
        ctx.h_shape, ctx.dtype, ctx.device = h.shape, h.dtype, h.device
        return h.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return delta_l."""
        assert ctx.star.e is not None, "the error arrives before any block is reached"
        star = ctx.star
        delta = project_error(star.e, ctx.B, ctx.h_shape, ctx.mask, star.layout, ctx.pooled)
        return delta.to(ctx.device, ctx.dtype), None, None, None, None


class Broadcast(torch.autograd.Function):
    """Identity on y; backward hands the error e to y's own graph and, by the star, to every ``Receive`` node."""

    @staticmethod
    def forward(ctx: Any, star: Star, y: Tensor, *receivers: Tensor) -> Tensor:
        """Return y."""
        ctx.star, ctx.receivers = star, [(r.dtype, r.device) for r in receivers]
        # Not a view: FSDP2 warns of views, whose pre-backward hook an in-place operation would drop.
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        """Return e for y, and zeros for the stand-ins."""
        ctx.star.e = e
        return (None, e, *(torch.zeros((), dtype=dtype, device=device) for dtype, device in ctx.receivers))
