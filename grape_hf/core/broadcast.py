"""The mode of a star: cut the graph at each h_l, and send e from y to all of them at once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from grape_hf.core.backward_effects import REENTRANT
from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.head_check import HeadCheck
from grape_hf.core.layout import Pairing
from grape_hf.core.lesson import Lesson
from grape_hf.core.modes import FollowingMode, Forward
from grape_hf.core.nodes import Broadcast, Cut, Last, Receive, Through
from grape_hf.core.star import Arm, Matrix, Star, autocast_dtype

if TYPE_CHECKING:
    from grape_hf.core.boundaries import Boundaries

Keep = Literal["nothing", "e", "e and deltas", "h and e"]


@dataclass(frozen=True)
class Refinement:
    """What a star does beside sending B_l e; see ``Star``.

    Args:
        maps: G_l, of which the matrices are the product.
        learn: whether the maps learn from this step's backward.
        sweeps: how often the deltas are corrected.
        path: whether the error takes the shortcut path of the very sample. B_l is what is added to it, and in the place
            of "identity" nothing is; the maps stand for the residual branches alone.
    """

    maps: BlockMaps | None = None
    learn: bool = False
    sweeps: int = 0
    path: bool = False

    @property
    def needs_graph(self) -> bool:
        """Whether deltas are computed with the graphs of blocks, before these run their backward."""
        return self.sweeps > 0 or self.path


NO_REFINEMENT = Refinement()
_IDLE = " A block that does nothing at times (stochastic depth) has to return its input itself, and no copy."


class BroadcastMode(FollowingMode):
    """Cut the graph at each h_l, and join its arms at y (``Boundaries.broadcast``)."""

    def __init__(
        self,
        boundaries: "Boundaries",
        B: list[Matrix | None],
        mask: Tensor | None = None,
        keep: Keep = "nothing",
        refinement: Refinement = NO_REFINEMENT,
    ) -> None:
        super().__init__(boundaries)
        self.B, self.mask, self.keep, self.refinement = B, mask, keep, refinement
        self.star = Star()  # of the forward under way
        self._begun: list[Star] = []
        self._looked = False  # whether heads were checked; of all forwards of a micro-batch, or of none
        self._anchor = torch.zeros((), requires_grad=True)
        # The stand-in of the node made last. Not the star's: its node holds the star, and would not be let go.
        self.token: Tensor | None = None

    def begin(self) -> None:
        """Begin a star of its own."""
        self._end()
        super().begin()
        self.star = self._new_star(self.forwards[-1])
        self._begun.append(self.star)

    def close(self) -> None:
        """End: let go of what waits for a backward that does not come."""
        self._end()
        self.boundaries.last_checked |= self._looked
        for star in self._begun:
            star.forget()

    def _end(self) -> None:
        """Count the forward under way if its blocks wait for an error that cannot come any more."""
        self.unheard += self.token is not None and self.star.site is None
        self.star, self.token = Star(), None

    def _new_star(self, forward: Forward) -> Star:
        refinement, lesson = self.refinement, None
        if refinement.learn or self.keep == "e and deltas":
            maps = refinement.maps if refinement.learn else None
            kept = forward.sent if self.keep == "e and deltas" else None
            corrected = refinement.sweeps > 0
            # Behind a boundary that is not cut a sweep shows what two blocks do, and the step's backward each of them.
            follows = not corrected or (any(b is None for b in self.B) and not refinement.path)
            lesson = Lesson(maps, follows, corrected, refinement.path, kept)
        around, effects = self.boundaries.around, self.boundaries.effects
        return Star(lesson, refinement.sweeps, refinement.path, refinement.maps, around, effects)

    def recomputation(self) -> "BroadcastMode":
        """Return a mode that does the same to the graph as this one. Raises RuntimeError if no forward had a graph."""
        if not self.forwards:  # what runs again ran without gradients: hooks inside a reentrant checkpoint
            raise RuntimeError(f"blocks run in the backward that had no graph in the forward. {REENTRANT}")
        return BroadcastMode(self.boundaries, self.B, refinement=self.refinement)

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Cut the graph behind h_l; its arm waits for y. Raises RuntimeError if the gradient is lost already."""
        mode = self.under_way()
        if mode is None:
            return h
        copied = index in self.boundaries.copied
        pairing = self.boundaries.pairing(index, h, self.mask)
        if mode is self:
            self.boundaries.check_size(index, h)
            forward = self._follow(index + 1, h)
            if self.keep == "h and e":
                forward.h[index] = h.detach().clone() if copied else h.detach()
                forward.pairings[index] = pairing
        if self.B[index] is None:
            if self.refinement.learn and h.requires_grad:
                assert isinstance(mode, BroadcastMode)
                h = Through.apply(h, mode.star, index, pairing.padding, pairing.padded(None))
            return h.clone() if copied else h
        if h.requires_grad:
            assert isinstance(mode, BroadcastMode)
            if mode.cuts_have_graphs:
                refuse_recomputed(index, h, block)
            mode.star.dtype = autocast_dtype(h)
            padding, still = pairing.padding, pairing.padded(None)
            mode.token = Receive.apply(h, mode.token, self.B[index], mode.star, index, padding, still)
            cut = mode.cut(index, h, pairing)
        else:
            if mode is self and self._last == index and not self._handed_on:
                check_gradient(index, h, block, _IDLE)
            cut = h.detach()
        return cut.clone() if copied else cut

    def at_last(self, h: Tensor) -> Tensor:
        """Return h_L, whose backward sees whether the loss reads it beside y."""
        mode = self.under_way()
        assert mode is None or isinstance(mode, BroadcastMode)
        if mode is None or mode.token is None or not h.requires_grad:
            return h
        boundaries = self.boundaries
        # In few steps (``FeedbackPoints.check``): that takes a backward of the head.
        look = mode is self and self.keep != "h and e" and not boundaries.last_checked
        self._looked |= look
        looks = look and not boundaries.whole and not torch.compiler.is_compiling()
        h = Last.apply(h, mode.star)
        # What comes at this very node: the block may have made something else of h_L that the head reads, too.
        seen = get_gradient_edge(h) if looks else None
        mode.star.head = HeadCheck(seen, boundaries.layout, paired=boundaries.read_at is None)
        return h

    @property
    def cuts_have_graphs(self) -> bool:
        """Whether what is read in the place of h_l gets a gradient."""
        return self.refinement.learn or self.refinement.needs_graph

    def cut(self, index: int, h: Tensor, pairing: Pairing) -> Tensor:
        """Return h_l without the graph of the block that made it; with a graph of its own where v is asked for."""
        refinement, B = self.refinement, self.B[index]
        if not self.cuts_have_graphs:
            return h.detach()
        cut = Cut.apply(h, self._anchor, self.star.lesson if refinement.learn else None, index)
        if refinement.needs_graph:
            added = None if refinement.path and isinstance(B, str) else B
            self.star.arms[index] = Arm(h, get_gradient_edge(cut), added, pairing)
        return cut

    def at_output(self, y: Tensor, site: int) -> Tensor:
        """Return y, whose backward sends e over the arms that wait."""
        mode = self.under_way()
        if mode is None:
            return y
        assert isinstance(mode, BroadcastMode)
        if mode is self and site < len(self.boundaries.blocks) and not self._handed_on:
            check_gradient(site, y, self.boundaries.blocks[site], _IDLE)
        if mode.token is not None:
            if mode is self and site >= len(self.boundaries):  # a block before the last may have another size
                self.boundaries.check_size(len(self.boundaries), y)
            mode.star.site = site
            mode.star.y = y if mode.star.arms or (mode.star.head and mode.star.head.looks) else None
            kept = self.forwards[-1].errors if mode is self and self.keep != "nothing" else None
            y = Broadcast.apply(y, mode.token, mode.star, site, kept)
        if mode is self and self.forwards:
            self.forwards[-1].reached, self.forwards[-1].site = True, site
            if self.keep == "h and e":
                self.forwards[-1].y = y.detach()
            if site >= len(self.boundaries):
                self._ended = True
                self._made.append(y.grad_fn)
        return y


def refuse_recomputed(index: int, h: Tensor, block: nn.Module) -> None:
    """Raise RuntimeError if block ``index + 1`` is run by a reentrant checkpoint, of which torch's node tells."""
    if type(h.grad_fn).__name__ == "CheckpointFunctionBackward":
        raise RuntimeError(
            f"the output of block {index + 1} ({type(block).__name__}) is recomputed in the backward, where its graph "
            f"is not cut. {REENTRANT}"
        )


def check_gradient(index: int, h: Tensor, block: nn.Module, advice: str = "") -> None:
    """Raise RuntimeError, with ``advice``, if block ``index + 1`` has weights to train and h no gradient for them."""
    if not h.requires_grad and any(p.requires_grad for p in block.parameters()):
        raise RuntimeError(
            f"the output of block {index + 1} ({type(block).__name__}) carries no gradient although the block has "
            f"weights to train. {REENTRANT}{advice}"
        )
