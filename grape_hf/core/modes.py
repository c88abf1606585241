"""What the hooks of ``boundaries.py`` do in a step: broadcast, record or perturb. Each object serves one ``with``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grape_hf.core.graph import graph_of, in_backward
from grape_hf.core.layout import Pairing
from grape_hf.core.nodes import Exact

if TYPE_CHECKING:
    from grape_hf.core.boundaries import Boundaries


@dataclass
class Forward:
    """What one forward of the model showed, by the boundary's index (0 for h_1).

    Attributes:
        h: the boundary activations.
        pairings: how h_l goes together with e.
        delta: what a backward left at h_l by way of the block behind it: the exact delta_l.
        y: the output that e is measured at.
        errors: what a backward left at each module that may have made y, by its number.
        site: the number of the module that did.
        call: the call of the model that this is (``calls.py``).
        apart: whether it is several calls: of an encoder by itself, and of the decoder.
        reached: whether it got to y.
        sent: the deltas that a star sent to each h_l.
    """

    h: dict[int, Tensor] = field(default_factory=dict)
    pairings: dict[int, Pairing] = field(default_factory=dict)
    delta: dict[int, Tensor] = field(default_factory=dict)
    y: Tensor | None = None
    errors: dict[int, Tensor] = field(default_factory=dict)
    site: int = 0
    call: Any = None
    apart: bool = False
    reached: bool = False
    sent: dict[int, Tensor] = field(default_factory=dict)

    @property
    def e(self) -> Tensor | None:
        """dLoss/dy; None before a backward."""
        return self.errors.get(self.site)

    def exact(self, index: int) -> bool:
        """Whether a backward left exact gradients at boundary ``index`` and at y: not where all before is frozen."""
        return index in self.delta and self.e is not None


class OutputReached(Exception):
    """Raised at y by ``perturb``, which also catches it, so that nothing behind y is computed."""


class Mode:
    """What happens at h_l and at y."""

    def at_block(self, index: int, h: Tensor, handed_on: bool = False) -> None:
        """Take note that block ``index`` made ``h``, or has handed on what it was called with, which has no graph."""

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Return what takes the place of h_l; ``args`` and ``kwargs`` are what the block was called with."""
        raise NotImplementedError

    def at_last(self, h: Tensor) -> Tensor:
        """Return what takes the place of h_L where y is behind it, the output of a head."""
        return h

    def at_output(self, y: Tensor, site: int) -> Tensor:
        """Return what takes the place of y, or of what is y if no later block runs; ``site`` numbers the module."""
        raise NotImplementedError


class FollowingMode(Mode):
    """A mode that follows the forwards with gradients, of which one loss may have several.

    Attributes:
        forwards: one for each.
        unheard: how many of them ended before y.
    """

    def __init__(self, boundaries: "Boundaries") -> None:
        self.boundaries = boundaries
        self.forwards: list[Forward] = []
        self.unheard = 0
        self._last = -1  # the block that ran last
        self._handed_on = False  # whether it did nothing
        self._ended = True  # whether no later module can make y
        self._call: Any = None  # of the model, in which the forward under way is
        self._made: list[Any] = []  # the graph's nodes of the last blocks
        self._nodes: set[Any] = set()  # of all blocks in the forward under way
        self._scratch: FollowingMode | None = None

    def begin(self) -> None:
        """Begin a forward."""
        self._call = self.boundaries.current_call
        self.forwards.append(Forward(call=self._call))
        self._last, self._ended, self._nodes = -1, False, set()

    def under_way(self) -> "FollowingMode | None":
        """Return the mode that acts now: none without gradients, and one to throw away during a recomputation.

        Activation checkpointing of a segment of blocks runs them, with their hooks, once more in the backward. What the
        hooks put into the graph must be the same there, and counts for nothing.
        """
        if not torch.is_grad_enabled():
            return None
        if not in_backward():
            return self
        self._scratch = self._scratch or self.recomputation()
        return self._scratch

    def recomputation(self) -> "FollowingMode":
        """Return a mode that does the same to the graph as this one."""
        return type(self)(self.boundaries)

    def at_block(self, index: int, h: Tensor, handed_on: bool = False) -> None:
        """Follow; raise RuntimeError if a block runs on what a later one made."""
        if self.under_way() is self:
            if index <= self._last:
                self._check_start(index, h)
            self._follow(index)
            self._last, self._handed_on = index, handed_on
            if not torch.compiler.is_compiling():
                self._nodes.add(h.grad_fn)
            if index == len(self.boundaries):
                self._made.append(h.grad_fn)

    def _follow(self, index: int, h: Tensor | None = None) -> Forward:
        """Return the forward in which block ``index`` runs, or is about to.

        Args:
            index: of the block.
            h: what it is about to read, if it was made by the block before.

        Raises:
            RuntimeError: if a further forward branches off from an earlier one, whose lower blocks get no error of it.
        """
        again, call = self._ended or index <= self._last, self.boundaries.current_call
        if again or self._call is not call:
            branches = h is not None and bool(self._nodes) and not self._nodes.isdisjoint(graph_of(h))
            if again and branches:
                block = type(self.boundaries.blocks[index]).__name__
                raise RuntimeError(
                    f"block {index + 1} ({block}) ran a second time on what the blocks below it had made once (a "
                    "second decoding of one encoding, several branches on one trunk). Only the first time would send "
                    'its error to all of them. Run the whole model each time, or use method="bp".'
                )
            if branches:  # an encoder called by itself, and now its decoder
                self._call, self.forwards[-1].apart = call, True
            else:
                self.begin()
        return self.forwards[-1]

    def _check_start(self, index: int, h: Tensor) -> None:
        block = type(self.boundaries.blocks[index]).__name__
        if any(node in self._made for node in graph_of(h)):
            raise RuntimeError(
                f"block {index + 1} ({block}) ran again on what the last block had made of its output. Direct "
                "feedback needs a chain of blocks that run once each: name others with the option `blocks`."
            )
        if not self._ended and self._call is self.boundaries.current_call and not self.boundaries.skips:
            raise RuntimeError(
                f"block {index + 1} ({block}) ran after block {self._last + 1}, before y was reached. Direct feedback "
                "needs blocks that run once each, in order, in every forward that leads to y. With several forwards "
                'for one head use feedback_space="hidden"; else name other blocks.'
            )


class RecordMode(FollowingMode):
    """Keep h_l and y of an ordinary forward, and what a backward leaves there (``Boundaries.record``)."""

    def __init__(self, boundaries: "Boundaries", mask: Tensor | None = None) -> None:
        super().__init__(boundaries)
        self.mask = mask

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Keep h_l, and have a backward keep its gradient, the exact delta_l."""
        mode = self.under_way()
        if mode is None:
            return h
        delta: dict[int, Tensor] = {}
        if mode is self:
            self.boundaries.check_size(index, h)
            forward = self._follow(index + 1, h)
            forward.h[index], delta = h, forward.delta
            forward.pairings[index] = self.boundaries.pairing(index, h, self.mask)
        passed = Exact.apply(h, delta, index) if h.requires_grad else h
        return passed.clone() if index in self.boundaries.copied else passed

    def at_output(self, y: Tensor, site: int) -> Tensor:
        """Keep y, and have a backward keep its gradient, e."""
        mode = self.under_way()
        if mode is None or not self.forwards:
            return y
        errors: dict[int, Tensor] = {}
        if mode is self:
            forward = self.forwards[-1]
            forward.site, errors = site, forward.errors
            self._ended = site >= len(self.boundaries)
            if self._ended:  # a block before the last may have another size
                self.boundaries.check_size(len(self.boundaries), y)
        y = Exact.apply(y, errors, site) if y.requires_grad else y
        if mode is self:
            forward.y = y
        return y


class PerturbMode(Mode):
    """Put in place of each h_l what a function returns for it, in one forward (``Boundaries.perturb``)."""

    def __init__(
        self,
        boundaries: "Boundaries",
        inject: Callable[[int, Tensor, nn.Module, tuple, dict], Tensor],
    ) -> None:
        self.boundaries, self.inject, self.forward = boundaries, inject, Forward()
        self.under_way = not torch.is_grad_enabled()  # else the forward meant begins with gradients
        self.ended = False

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Return what ``inject`` makes of h_l, in the forward that is meant and in no other."""
        if self.ended:  # a further forward for the same loss
            return h
        self.under_way = self.under_way or torch.is_grad_enabled()
        if not self.under_way:
            return h
        self.boundaries.check_size(index, h)
        return self.inject(index, h, block, args, kwargs)

    def at_output(self, y: Tensor, site: int) -> Tensor:
        """Keep y, and end the forward there, unless the whole is wanted."""
        if not self.under_way or self.ended:
            return y
        self.forward.y = y
        if site < len(self.boundaries):
            return y
        self.ended = True
        if not self.boundaries.whole:
            raise OutputReached
        return y.detach()  # leaves the tangent behind, too
