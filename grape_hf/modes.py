"""What the hooks of ``boundaries.py`` do in a step: broadcast, record or perturb. Each object serves one ``with``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grape_hf.layout import AUTO, Layout
from grape_hf.star import Broadcast, Matrix, Receive, Star, own_mask

if TYPE_CHECKING:
    from grape_hf.boundaries import Boundaries


@dataclass
class Forward:
    """What one forward of the model showed: ``h`` by the boundary's index (0 for h_1), and ``y``.

    ``pooled`` is ``Boundaries.pooled``.
    """

    layout: Layout = AUTO
    h: dict[int, Tensor] = field(default_factory=dict)
    y: Tensor | None = None
    pooled: frozenset[int] = frozenset()

    def exact(self, index: int) -> bool:
        """Whether a backward left exact gradients at boundary ``index`` and at y: not where all before is frozen."""
        h = self.h.get(index)
        return h is not None and h.grad is not None and self.y is not None and self.y.grad is not None


class OutputReached(Exception):
    """Raised at y by ``perturb``, which also catches it, so that nothing behind y is computed."""


class Mode:
    """What happens at h_l and at y."""

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Return what takes the place of h_l; ``args`` and ``kwargs`` are what the block was called with."""
        raise NotImplementedError

    def at_output(self, y: Tensor) -> Tensor:
        """Return what takes the place of y."""
        raise NotImplementedError


class BroadcastMode(Mode):
    """Cut the graph at each h_l, and join its arms at y (``Boundaries.broadcast``)."""

    def __init__(self, boundaries: "Boundaries", B: list[Matrix | None], mask: Tensor | None, keep: bool) -> None:
        self.B, self.mask, self.check_size = B, mask, boundaries.check_size
        self.layout, self.copied, self.pooled = boundaries.layout, boundaries.copied, boundaries.pooled
        self.star = Star(self.layout)  # of the forward under way
        self.keep, self.forwards = keep, list[Forward]()
        self.outputs: list[Any] = []  # where the stars of earlier forwards begin
        self.waiting: dict[int, Tensor | None] = {}  # by boundary; None where nothing before it is trained

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Cut the graph behind h_l; its arm waits for y. Raises RuntimeError if blocks are no chain that runs once."""
        if not torch.is_grad_enabled():
            return h
        if self.waiting and index <= max(self.waiting):
            raise RuntimeError(
                f"block {index + 1} ({type(block).__name__}) ran after block {max(self.waiting) + 1}, before y was "
                "reached. Direct feedback needs blocks that run once each, in order, in every forward that leads to y. "
                'With several forwards for one head use feedback_space="hidden"; else name other blocks.'
            )
        if index == 0 and self.outputs and any(node in self.outputs for node in graph_of(h)):
            raise RuntimeError(
                f"block 1 ({type(block).__name__}) ran again on what the last block had made of its output. Direct "
                "feedback needs a chain of blocks that run once each: name others with the option `blocks`."
            )
        self.check_size(index, h)
        if self.keep:
            if not self.waiting:
                self.forwards.append(Forward(self.layout, pooled=self.pooled))
            self.forwards[-1].h[index] = h.detach()
        self.waiting[index] = None
        if (B := self.B[index]) is None:
            return h.clone() if index in self.copied else h
        if h.requires_grad:
            mask = own_mask(self.mask, index, self.pooled)
            self.waiting[index] = Receive.apply(h, B, self.star, mask, index in self.pooled)
        elif any(p.requires_grad for p in block.parameters()):
            raise RuntimeError(
                f"the output of block {index + 1} ({type(block).__name__}) carries no gradient although the block has "
                "weights to train. Reentrant activation checkpointing does this: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        return h.detach().clone() if index in self.copied else h.detach()

    def at_output(self, y: Tensor) -> Tensor:
        """Return y, whose backward sends e over the arms that wait."""
        if not torch.is_grad_enabled():
            return y
        receivers = [r for r in self.waiting.values() if r is not None]
        if receivers:
            y = Broadcast.apply(self.star, y, *receivers)
            self.outputs.append(y.grad_fn)
        if self.keep and self.waiting:
            self.forwards[-1].y = _keep_grad(y)
        self.waiting, self.star = {}, Star(self.layout)  # a further forward for the same loss is a star of its own
        return y

    def close(self) -> None:
        """Raise RuntimeError if blocks wait for an error that cannot come any more."""
        if self.waiting:
            raise RuntimeError(
                f"blocks 1 to {max(self.waiting) + 1} ran, and the module whose output is y never did, so they got no "
                "error. Was the head left out of the forward?"
            )


class RecordMode(Mode):
    """Keep h_l and y of an ordinary forward (``Boundaries.record``)."""

    def __init__(self, boundaries: "Boundaries") -> None:
        self.check_size = boundaries.check_size
        self.layout, self.copied, self.pooled = boundaries.layout, boundaries.copied, boundaries.pooled
        self.forwards: list[Forward] = []

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Keep h_l, and have a backward keep its gradient, the exact delta_l."""
        if torch.is_grad_enabled():
            self.check_size(index, h)
            if index == 0 or not self.forwards:
                self.forwards.append(Forward(self.layout, pooled=self.pooled))
            self.forwards[-1].h[index] = _keep_grad(h)
            return h.clone() if index in self.copied else h
        return h

    def at_output(self, y: Tensor) -> Tensor:
        """Keep y, and have a backward keep its gradient, e."""
        if torch.is_grad_enabled() and self.forwards:
            self.forwards[-1].y = _keep_grad(y)
        return y


class PerturbMode(Mode):
    """Put in place of each h_l what a function returns for it, in one forward (``Boundaries.perturb``)."""

    def __init__(
        self,
        inject: Callable[[int, Tensor, nn.Module, tuple, dict], Tensor],
        whole: bool,
        check_size: Callable[[int, Tensor], None],
    ) -> None:
        self.inject, self.whole, self.check_size, self.forward = inject, whole, check_size, Forward()
        self.under_way = not torch.is_grad_enabled()  # else the forward meant begins with gradients

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Return what ``inject`` makes of h_l, in the forward that is meant and in no other."""
        if self.forward.y is not None:  # a further forward for the same loss
            return h
        self.under_way = self.under_way or torch.is_grad_enabled()
        if not self.under_way:
            return h
        self.check_size(index, h)
        return self.inject(index, h, block, args, kwargs)

    def at_output(self, y: Tensor) -> Tensor:
        """Keep y, and end the forward there, unless the whole is wanted."""
        if not self.under_way or self.forward.y is not None:
            return y
        self.forward.y = y
        if not self.whole:
            raise OutputReached
        return y.detach()  # leaves the tangent behind, too


def graph_of(h: Tensor) -> Iterator[Any]:
    """Yield the nodes of autograd's graph behind ``h``."""
    nodes: list[Any] = [h.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        nodes.extend(parent for parent, _ in node.next_functions)


def _keep_grad(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.retain_grad()
    return h
