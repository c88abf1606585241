r"""The autograd nodes of the star: the error e, put in at y, comes out at each h_l as delta_l.

Two nodes share a ``Star``. ``Broadcast`` stands at y, and its backward puts e in; ``Receive`` stands behind each h_l,
and its backward takes e out, projected. Between them there is no path but scalars that tell autograd the order: each
node takes the stand-in of the one made before it. Where the gradient at the input of a block is asked for, a third
node, ``Cut``, stands before it. ``Through`` and ``Exact`` let the gradient pass, and listen: the first where a
boundary of a star is not cut, the second in ordinary backpropagation.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from grape_hf.core.layout import Pairing
from grape_hf.core.lesson import Lesson
from grape_hf.core.star import Matrix, Star


def _undifferentiated(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a backward raise RuntimeError where autograd is to differentiate it: what it returns has no graph."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss differentiates a gradient (create_graph=True, as for a gradient penalty), and the gradient "
                "that direct feedback sends to a block, B_l e, has no derivative: expected a loss that takes none, or "
                'method="bp".'
            )
        return backward(ctx, *gradients)

    return checked


class Receive(torch.autograd.Function):
    """Stand between h_l and the error: backward turns e into delta_l, when block l's turn comes and not before.

    Forward returns a scalar stand-in, by which the next node knows this one. As the node is made right after block l,
    autograd runs it right before block l's backward: one delta_l at a time is in memory, whatever the depth.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        token: Tensor | None,
        B: Matrix | None,
        star: Star,
        index: int,
        padding: Tensor | None,
        pairing: Pairing,
    ) -> Tensor:
        """Return the stand-in."""
        ctx.B, ctx.star, ctx.index, ctx.padding, ctx.pairing = B, star, index, padding, pairing
        ctx.h_shape, ctx.dtype, ctx.device = h.shape, h.dtype, h.device
        ctx.before = None if token is None else token.detach()
        # All stand-ins of a device are one zero: on a GPU each of its own would be a kernel.
        return h.new_zeros(()) if token is None or token.device != h.device else token.detach()

    @staticmethod
    @_undifferentiated
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return delta_l; nothing while a sweep comes by."""
        if ctx.star.aside:
            return (None,) * 7
        delta = ctx.star.delta(ctx.index, ctx.B, ctx.h_shape, ctx.pairing.padded(ctx.padding))
        return delta.to(ctx.device, ctx.dtype), ctx.before, None, None, None, None, None


class Cut(torch.autograd.Function):
    """Identity on h_l, detached from the block that made it; backward notes v, the gradient that the next one sends.

    ``anchor`` is any tensor that requires a gradient, and gets none: for its sake the backward comes as far as here.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, anchor: Tensor, lesson: Lesson | None, index: int) -> Tensor:
        """Return h."""
        ctx.lesson, ctx.index = lesson, index
        return h.detach()

    @staticmethod
    @_undifferentiated
    def backward(ctx: Any, v: Tensor) -> tuple[None, ...]:
        """Note v, and hand nothing on."""
        if ctx.lesson is not None:
            ctx.lesson.arrived(ctx.index, v)
        return None, None, None, None


class Through(torch.autograd.Function):
    """Identity on h_l at a boundary that is not cut; backward tells the star of the exact gradient that comes by.

    So the map of the block behind learns, and that of the block before, by whose products the lower blocks get their
    error.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, star: Star, index: int, padding: Tensor | None, pairing: Pairing) -> Tensor:
        """Return h."""
        ctx.star, ctx.index, ctx.padding, ctx.pairing = star, index, padding, pairing
        return h.detach()

    @staticmethod
    @_undifferentiated
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient as it came."""
        star = ctx.star
        if star.lesson is not None and star.e is not None and not star.aside:
            star.lesson.passed(ctx.index, delta, ctx.pairing.padded(ctx.padding), star.e)
        return delta, None, None, None, None


class Last(torch.autograd.Function):
    """Identity on h_L in front of a head whose output is y; backward shows the star all that reaches h_L."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, star: Star) -> Tensor:
        """Return h."""
        ctx.star = star
        return h.detach()

    @staticmethod
    @_undifferentiated
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it came; see ``Star.check_last``."""
        ctx.star.check_last(gradient)
        return gradient, None


class Broadcast(torch.autograd.Function):
    """Identity on y; backward hands the error e to y's own graph and, by the star, to every ``Receive`` node."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, token: Tensor, star: Star, site: int, kept: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Return y."""
        ctx.star, ctx.site, ctx.kept, ctx.before = star, site, kept, token.detach()
        # Not a view: FSDP2 warns of views, whose pre-backward hook an in-place operation would drop.
        return y.detach()

    @staticmethod
    @_undifferentiated
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        """Return e for y, and zero for the stand-in."""
        if ctx.site == ctx.star.site:
            if ctx.kept is not None:
                ctx.kept[ctx.site] = e
            ctx.star.put(e)
        return e, ctx.before, None, None, None


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
