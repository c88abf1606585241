"""The hooks of one block: where it hands on its hidden states, and where it reads those of the block before."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.block_lists import ends
from grape_hf.core.in_place import as_made, part_of, replace, whole_of
from grape_hf.core.modes import Mode, PerturbMode

if TYPE_CHECKING:
    from grape_hf.core.boundaries import Boundaries


class BlockHook:
    """The hooks of one block: at its output, and at its input where it is a part of a plain stack."""

    def __init__(self, boundaries: "Boundaries", index: int, block: nn.Module) -> None:
        self.boundaries, self.index, self.block = boundaries, index, block
        self.inputs: tuple[tuple, dict] = (), {}
        self.made: weakref.ref[Tensor] | None = None  # what it has handed on last
        self.cuts = index < len(boundaries) and not boundaries.readers[index]
        # y, or what is y if the blocks behind are left out
        encoder = max(boundaries.pooled, default=-1)
        last = index == len(boundaries)
        self.makes_y = boundaries.hidden and boundaries.end is None and (last or (not self.cuts and index > encoder))

    def at_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Remember what the block is called with, for an estimate that runs it again with other weights."""
        if isinstance(self.boundaries._mode, PerturbMode):
            self.inputs = args, kwargs

    def at_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Put what the mode makes of h_l, or of y, into what the block returns."""
        mode = self.boundaries._mode
        if mode is None:
            return None
        path = nested.find(output, self.boundaries.parts.get(self.index))
        h = None if path is None else nested.get(output, path)
        if not isinstance(h, Tensor):
            raise no_hidden_states(self.index, self.block, output)
        assert path is not None
        whole = ends(self.block)[0] is module
        mode.at_block(self.index, h, whole and _handed_on(h, args, kwargs))
        if isinstance(mode, PerturbMode) and whole and self.index < len(self.boundaries):
            self.inputs = args, kwargs
        new = h
        if self.cuts:
            new = mode.at_boundary(self.index, h, self.block, *self.taken())
        elif self.makes_y:
            new = mode.at_output(h, self.index)
        elif self.index == len(self.boundaries) and not self.boundaries.hidden:
            new = mode.at_last(h)
        if not self.cuts and not torch.compiler.is_compiling():
            self.made = weakref.ref(new)
        return None if new is h else nested.put(output, path, new)

    def found_in(self, inputs: Any) -> nested.Path | None:
        """Return where the very tensor lies that this block has handed on; None if it is not there."""
        made = None if self.made is None or torch.compiler.is_compiling() else self.made()
        return None if made is None else next((path for path, t in nested.tensors(inputs) if t is made), None)

    def taken(self) -> tuple[tuple, dict]:
        """Return what the block was called with, and forget it."""
        inputs, self.inputs = self.inputs, ((), {})
        return inputs


def no_hidden_states(index: int, block: nn.Module, output: Any) -> TypeError:
    """Return the error for a block that returns nothing that a boundary can be put behind."""
    found = [f"{t.dtype} of shape {tuple(t.shape)}" for _, t in nested.tensors(output)]
    return TypeError(
        f"block {index + 1} ({type(block).__name__}) was expected to return its hidden states, floating-point numbers "
        "of shape (batch, ...), or a tuple, a list, a mapping or a dataclass that holds them; it returned "
        f"{type(output).__name__}{': ' if found else ''}{', '.join(found)}. Name other blocks with the option `blocks`."
    )


def _handed_on(h: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether h, which has no graph, is what the block was called with: stochastic depth inside the block."""
    return not h.requires_grad and any(t is h for _, t in nested.tensors((args, kwargs)))


class ReaderHook:
    """The hook at the input of a block that reads one h_l, or a decoder's, which reads two."""

    def __init__(self, boundaries: "Boundaries", module: nn.Module, hooks: list[BlockHook]) -> None:
        self.boundaries, self.hooks = boundaries, hooks
        self.indices = [index for index, readers in enumerate(boundaries.readers) if module in readers]

    def at_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put what the mode makes of h_l into what the block is called with."""
        mode = self.boundaries._mode
        if mode is None:
            return None
        inputs: Any = (args, kwargs)
        for index in self.indices:
            path = self.boundaries.places.get(index)
            if path is None or index not in self.boundaries.pooled:  # a decoder may go without its encoder's output
                path = self.hooks[index].found_in(inputs) or nested.find(inputs, path)
            h = None if path is None else nested.get(inputs, path)
            if not isinstance(h, Tensor):
                continue
            assert path is not None
            if self.boundaries.in_place:
                put_in_place(h, partial(self._read, mode, index))
                continue
            new = self._read(mode, index, h)
            for place in (path, *self.boundaries.repeated.get(index, ())):  # query, key and value may be one tensor
                if nested.get(inputs, place) is h:
                    inputs = nested.put(inputs, place, new)
        return inputs

    def _read(self, mode: Mode, index: int, h: Tensor) -> Tensor:
        """Return what takes the place of h_l: the same for all that read the same."""
        hook = self.hooks[index]
        if index not in self.boundaries.pooled:
            return mode.at_boundary(index, h, hook.block, *hook.taken())
        read, call = self.boundaries._read_before.get(index), self.boundaries.current_call
        if read is None or read[0] is not mode or read[1] is not h or read[2] is not call:
            read = mode, h, call, mode.at_boundary(index, h, hook.block, *hook.taken())
            self.boundaries._read_before[index] = read
        return read[3]


class OutputHook:
    """The hook at y where that is not what a block makes."""

    def __init__(self, boundaries: "Boundaries") -> None:
        self.boundaries = boundaries

    def at_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Put what the mode makes of y into what the head returns."""
        mode, path = self.boundaries._mode, nested.first_floating(output)
        if mode is None or path is None:
            return None
        return nested.put(output, path, mode.at_output(nested.get(output, path), len(self.boundaries.blocks)))

    def at_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put what the mode makes of y in its place, a sum that the module reads (``in_place.py``), or a part of it."""
        mode, last = self.boundaries._mode, len(self.boundaries)
        if mode is None:
            return None
        path = self.boundaries.places[last]
        y = nested.get((args, kwargs), path)
        if y._is_view():  # x[:, 0], and nobody else reads x
            return nested.put((args, kwargs), path, part_of(mode.at_output(whole_of(y), last), y))
        put_in_place(y, partial(mode.at_output, site=last))
        return None


def put_in_place(h: Tensor, make: Callable[[Tensor], Tensor]) -> None:
    """Have all who read h from now on read what ``make`` returns for it."""
    made = as_made(h)
    new = make(made)
    if new is not made:
        replace(h, new)
