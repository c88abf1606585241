"""Residual sums that a model makes outside of its blocks, as the first look sees them (``core/in_place.py``)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.graph import Mark, graph_of, in_backward, is_mark, marks_of
from grape_hf.core.in_place import ADVICE, as_made, part_of, replace, whole_of

if TYPE_CHECKING:
    from grape_hf.engine.look import Watcher

_MADE = ("made",)  # marks what a block makes, where the hidden states are a sum of that and of what it was given


class Sums:
    """What is seen of residual sums in the forward that a ``Watcher`` follows.

    Where they are cut in place already (``Boundaries.in_place``) they are marked in the place of what blocks make. The
    methods are handed what else is seen: an object that both hold would keep all tensors until Python looks for cycles.

    Attributes:
        found: whether a block reads what the one before has made together with what that one was given.
        early: whether such a sum is read by something else before the next block.
        end: the module that reads such a sum behind the last block, if one alone does.
        y: that sum.
    """

    def __init__(self) -> None:
        self.found = self.early = False
        self.end: nn.Module | None = None
        self.y: Tensor | None = None
        self._called: set[nn.Module] = set()  # of those outside of blocks

    @staticmethod
    def main(seen: "Watcher", index: int) -> nested.Path:
        """How what a block makes is marked: by where it is, unless a sum of it is."""
        return _MADE if seen.boundaries.in_place else seen.parts[index]

    def at_reader(self, seen: "Watcher", index: int, h: Tensor) -> None:
        """See h_l as the next block reads it."""
        if seen.boundaries.in_place:
            self._mark(seen, h, index)
        elif 0 < index < len(seen.boundaries) - 1:  # the last block may read others as well
            self.found |= (index - 1, seen.parts[index - 1]) in marks_of([h])

    @staticmethod
    def at_several(seen: "Watcher", index: int) -> None:
        """Raise RuntimeError where h_l is read as several tensors, and would have to be cut in place."""
        if seen.boundaries.in_place:
            raise RuntimeError(
                f"block {index + 2} reads h_{index + 1}, which parts of blocks or residual sums outside of them read, "
                f"too, as several tensors: expected one. {ADVICE}"
            )

    def at_module(self, seen: "Watcher", module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Find what reads a sum behind the last block: y, if the blocks read such sums, too."""
        last, several = len(seen.boundaries), module in self._called
        if not last or not torch.is_grad_enabled() or in_backward() or seen.again:
            return None
        self._called.add(module)
        if module is self.end:  # at each of several places it reads something else
            self.end = None
        if several or last not in seen.made or last in seen.places:
            return None
        for path, t in nested.tensors((args, kwargs)):
            marks = marks_of([t]) if t.is_floating_point() and t.requires_grad else set()
            if not marks.issuperset({(last, self.main(seen, last)), (last - 1, seen.parts[last - 1])}):
                continue
            if seen.boundaries.in_place:
                seen.places[last], self.end = path, module
                self.y = self._mark(seen, whole_of(t), last, in_part=t._is_view())
                return nested.put((args, kwargs), path, part_of(self.y, t)) if t._is_view() else None
            made = seen.made[last - 1]
            h = seen.read.get(last - 1, made)  # as the block reads it: a decode head may before norms
            self.found |= h is not made and h.grad_fn in graph_of(t, ends=is_mark)
            break
        return None

    def _mark(self, seen: "Watcher", h: Tensor, index: int, in_part: bool = False) -> Tensor:
        """Return h, marked for all who read it from now on, or ``in_part`` for those that get what is returned."""
        self.early |= any(path == _MADE and k < index for k, path in marks_of([h]))
        marked = Mark.apply(as_made(h), (index, seen.parts[index]))
        if not in_part:
            replace(h, marked)
        return marked if in_part else h
