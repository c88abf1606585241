r"""The autograd nodes of the star: the error e, put in at y, comes out at each h_l as :math:`\delta_l = B_l e`.

Two nodes share a ``Star``. ``Broadcast`` stands at y, and its backward puts e in; ``Receive`` stands behind each h_l,
and its backward takes e out, projected. Between them there is no path but scalars that tell autograd the order: each
node takes the stand-in of the one made before it. Where the gradient at the input of a block is asked for, a third
node, ``Cut``, stands before it.

A **sweep** corrects all deltas at once before they are used (parareal in depth). Every block applies its exact
transposed Jacobian F_l to the delta that it has, and what that shows is passed down by cheap coarse maps C_l:

.. math:: \delta'_{l-1} = F_l(\delta_l) + C_l(\delta'_l - \delta_l), \qquad \delta'_L = \delta_L = e.

After n sweeps the n highest deltas are exact, so L - 1 sweeps are backpropagation. Source: METHOD.md; published for
C = identity as Highway-BP (Fagnou et al., ICLR 2025, arXiv 2501.17086).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grape_hf.core.block_maps import BlockMaps, aligned_source
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


@dataclass
class Lesson:
    """What the maps learn in one backward: v, the gradient at the input of a block, beside the delta that it got.

    It holds no part of the graph, whose nodes hold it.

    Attributes:
        maps: what learns; None where deltas are only kept.
        explicit: whether G d has to be computed: after sweeps delta_l is no longer the product.
        kept: where the deltas of all boundaries are put, to be looked at afterwards; None if nobody will.
    """

    maps: BlockMaps | None = None
    explicit: bool = False
    kept: dict[int, Tensor] | None = None
    _e: Tensor | None = None
    _deltas: dict[int, tuple[Tensor, Pairing]] = field(default_factory=dict)
    _inputs: dict[int, Tensor] = field(default_factory=dict)

    def sent(self, index: int, delta: Tensor, pairing: Pairing, e: Tensor) -> None:
        """Note the delta of a boundary."""
        if self.kept is not None:
            self.kept[index] = delta
        if self.maps is not None:
            self._e, self._deltas[index] = e, (delta, pairing)
            self._learn(index)

    def arrived(self, index: int, v: Tensor) -> None:
        """Note the gradient at h_l as the block behind it has computed it."""
        if self.maps is not None:
            self._inputs[index] = v
            self._learn(index)

    def _learn(self, index: int) -> None:
        """Learn as soon as both are there: either may come first."""
        maps = self.maps
        if maps is None or self._e is None or index not in self._deltas or index not in self._inputs:
            return
        delta, pairing = self._deltas[index]
        vectors = pairing.layout.vectors
        source = maps.sources[index]
        v, predicted = vectors(self._inputs.pop(index)), vectors(delta)
        if source is None:
            d = aligned_source(self._e, pairing, v.shape[1])
            if d.shape[1] != v.shape[1]:
                d = pairing.unpadded(d.expand(-1, v.shape[1], -1))
        elif source in self._deltas:
            above, its_pairing = self._deltas.pop(source)
            d = its_pairing.layout.vectors(above)
        else:  # the boundary between was left out, or given up
            return
        if self.explicit:
            predicted = pairing.unpadded(maps.apply(index, d.to(v)).expand_as(v))
        maps.observe(index, v, d, predicted)


class Star:
    """Where the error of one forward waits for the blocks: the node at y puts it in, the nodes at each h_l read it.

    Whoever has e may put it in: a process that holds only some of the blocks gets it from the one that holds y.

    Args:
        lesson: what is noted meanwhile; nothing by default.
        sweeps: how often the deltas are corrected before they are used.
        coarse: C_l: a function of the boundary and the difference of two deltas of the boundary behind it, in their
            shapes, that returns what to add, or None where there is no such map.

    Attributes:
        e: dLoss/dy, in the shape of y; None before the backward gets there.
        site: which node is the one at y. Where blocks are left out at random any of them may be the last that ran.
        arms: for each boundary h_l with its graph, the cut tensor that is read in its place, and how delta is made.
            Kept for sweeps alone.
        y: the output with its graph, kept for sweeps alone.
    """

    def __init__(
        self,
        lesson: Lesson | None = None,
        sweeps: int = 0,
        coarse: Callable[[int, int, Tensor], Tensor | None] | None = None,
    ) -> None:
        self.e: Tensor | None = None
        self.site: int | None = None
        self.lesson, self.sweeps, self.coarse = lesson, sweeps, coarse
        self.arms: dict[int, tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = {}
        self.y: Tensor | None = None
        self.swept: dict[int, Tensor] = {}

    def put(self, e: Tensor) -> None:
        """Put the error in, and correct the deltas if that is wanted."""
        self.e = e
        if self.arms:
            self.swept = self._sweep(e)
            self.forget()

    def forget(self) -> None:
        """Let go of the graph."""
        self.arms, self.y = {}, None

    def delta(self, index: int, B: Matrix, h_shape: torch.Size, pairing: Pairing) -> Tensor:
        """Return delta_l: B_l e, or what sweeps have made of it.

        Args:
            index: of the boundary.
            B: feedback matrix, ``(n_l, n_y)``.
            h_shape: shape of h_l.
            pairing: how positions of h_l and of e go together.
        """
        assert self.e is not None, "the error arrives before any block is reached"
        delta = self.swept.pop(index, None)
        delta = project_error(self.e, B, h_shape, pairing) if delta is None else delta
        if self.lesson is not None:
            self.lesson.sent(index, delta, pairing, self.e)
        return delta

    def _sweep(self, e: Tensor) -> dict[int, Tensor]:
        """Return the corrected deltas of all boundaries in the shapes of their h_l."""
        assert self.y is not None
        indices = sorted(self.arms)
        deltas = {index: make(e).to(h.device, h.dtype) for index, (h, _, make) in self.arms.items()}
        for number in range(min(self.sweeps, len(indices))):
            below = indices[: len(indices) - number]  # those above are exact by now
            # The arms are cut from each other, so each input gets what its own block sends it.
            outputs = [self.arms[index][0] for index in indices[1:]] + [self.y]
            errors = [deltas[index] for index in indices[1:]] + [e.to(self.y.dtype)]
            inputs = [self.arms[index][1] for index in below]
            exact = torch.autograd.grad(outputs, inputs, errors, retain_graph=True, allow_unused=True)
            corrected = dict(deltas)
            for index, v in reversed(list(zip(below, exact, strict=True))):
                if v is None:  # the block behind it was left out
                    continue
                above = index + 1
                change = None
                if above in corrected and self.coarse is not None and corrected[above] is not deltas[above]:
                    change = self.coarse(index, above, corrected[above] - deltas[above].to(corrected[above].device))
                corrected[index] = v if change is None else v + change.to(v.device, v.dtype)
            deltas = corrected
        return deltas


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
        B: Matrix,
        star: Star,
        index: int,
        padding: Tensor | None,
        pairing: Pairing,
    ) -> Tensor:
        """Return the stand-in."""
        ctx.B, ctx.star, ctx.index, ctx.padding, ctx.pairing = B, star, index, padding, pairing
        ctx.h_shape, ctx.dtype, ctx.device = h.shape, h.dtype, h.device
        ctx.before = None if token is None else (token.dtype, token.device)
        return h.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return delta_l."""
        delta = ctx.star.delta(ctx.index, ctx.B, ctx.h_shape, ctx.pairing.padded(ctx.padding))
        return delta.to(ctx.device, ctx.dtype), _zero(ctx.before), None, None, None, None, None


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
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[None, ...]:
        """Note v, and hand nothing on."""
        if ctx.lesson is not None:
            ctx.lesson.arrived(ctx.index, v)
        return None, None, None, None


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
            if ctx.kept is not None:
                ctx.kept[ctx.site] = e
            ctx.star.put(e)
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
