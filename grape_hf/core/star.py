r"""The autograd nodes of the star: the error e, put in at y, comes out at each h_l as :math:`\delta_l = B_l e`.

Two nodes share a ``Star``. ``Broadcast`` stands at y, and its backward puts e in; ``Receive`` stands behind each h_l,
and its backward takes e out, projected. Between them there is no path but scalars that tell autograd the order: each
node takes the stand-in of the one made before it.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grape_hf.core.layout import Pairing

Matrix = Tensor | Literal["identity"]


def project_error(e: Tensor, B: Matrix, h_shape: torch.Size, pairing: Pairing) -> Tensor:
    r"""Return delta_l = B_l e for every position of h_l.

    Args:
        e: dLoss/dy in the shape of y.
        B: feedback matrix, ``(n_l, n_y)``, or "identity". The product is computed in the dtype of e.
        h_shape: shape of h_l, which is the shape of the result.
        pairing: how positions of h_l and of e go together. Its padding matters only where one error per sample goes to
            several positions: at others there is no error to begin with.
    """
    layout = pairing.layout
    e = layout.vectors(e)
    n_l = e.shape[-1] if isinstance(B, str) else B.shape[0]
    batch, positions = h_shape[0], h_shape.numel() // (h_shape[0] * n_l)
    e = pairing.align(e, positions)
    delta = e if isinstance(B, str) else e.to(B.device) @ B.mT.to(e.dtype)  # (batch, positions or 1, n_l)
    if delta.shape[1] != positions:
        delta = pairing.unpadded(delta.expand(batch, positions, n_l))
    return layout.restore(delta, h_shape)


class Star:
    """Where the error of one forward waits for the blocks: the node at y puts it in, the nodes at each h_l read it.

    Attributes:
        e: dLoss/dy, in the shape of y; None before the backward gets there.
        site: which node is the one at y. Where blocks are left out at random any of them may be the last that ran.
    """

    def __init__(self) -> None:
        self.e: Tensor | None = None
        self.site: int | None = None


class Receive(torch.autograd.Function):
    """Stand between h_l and the error: backward turns e into delta_l, when block l's turn comes and not before.

    Forward returns a scalar stand-in, by which the next node knows this one. As the node is made right after block l,
    autograd runs it right before block l's backward: one delta_l at a time is in memory, whatever the depth.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, token: Tensor | None, B: Matrix, star: Star, padding: Tensor | None, pairing: Pairing
    ) -> Tensor:
        """Return the stand-in."""
        ctx.B, ctx.star, ctx.padding, ctx.pairing = B, star, padding, pairing
        ctx.h_shape, ctx.dtype, ctx.device = h.shape, h.dtype, h.device
        ctx.before = None if token is None else (token.dtype, token.device)
        return h.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return delta_l."""
        assert ctx.star.e is not None, "the error arrives before any block is reached"
        delta = project_error(ctx.star.e, ctx.B, ctx.h_shape, ctx.pairing.padded(ctx.padding))
        return delta.to(ctx.device, ctx.dtype), _zero(ctx.before), None, None, None, None


class Broadcast(torch.autograd.Function):
    """Identity on y; backward hands the error e to y's own graph and, by the star, to every ``Receive`` node."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, token: Tensor, star: Star, site: int, kept: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Return y."""
        ctx.star, ctx.site, ctx.kept, ctx.before = star, site, kept, (token.dtype, token.device)
        # Not a view: FSDP2 warns of views, whose pre-backward hook an in-place operation would drop.
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        """Return e for y, and zero for the stand-in."""
        if ctx.site == ctx.star.site:
            ctx.star.e = e
            if ctx.kept is not None:
                ctx.kept[ctx.site] = e
        return e, _zero(ctx.before), None, None, None


class Exact(torch.autograd.Function):
    """Identity on h_l or y in an ordinary graph; backward keeps what came from behind: the exact delta_l, or e.

    What reads h_l elsewhere (an auxiliary head) is not in it.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, kept: dict[int, Tensor], index: int) -> Tensor:
        """Return h."""
        ctx.kept, ctx.index = kept, index
        return h.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        """Keep the gradient, and hand it on."""
        ctx.kept[ctx.index] = delta.detach()
        return delta, None, None


def _zero(like: tuple[torch.dtype, torch.device] | None) -> Tensor | None:
    return None if like is None else torch.zeros((), dtype=like[0], device=like[1])
