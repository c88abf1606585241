"""Hooks that see, in one forward on the side, how blocks and heads work on one another (``probe.py`` judges)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.hooks import RemovableHandle

from grape_hf.core import nested
from grape_hf.core.backward_effects import REENTRANT
from grape_hf.core.block_hooks import no_hidden_states
from grape_hf.core.block_lists import ends
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.channels import Channels
from grape_hf.core.graph import Mark, in_backward, in_reentrant_checkpoint, is_mark, marks_of, parameters_of
from grape_hf.core.hooks import Hook
from grape_hf.core.layout import Layout
from grape_hf.engine.sums import Sums

logger = logging.getLogger(__name__)

NO_GRADIENTS = (
    "A loss that runs the model without gradients first, and with them in the backward (a cached loss), cannot be "
    'trained by direct feedback: compute it at once, or use method="bp". '
    "Where the first steps run the blocks under `no_grad`, freeze these in place of it (`requires_grad_(False)`, in a "
    "callback's `on_step_begin`)."
)


class Watcher:
    """What its hooks see in the first forward with gradients: every tensor that a block makes is marked.

    Args:
        model: the model.
        boundaries: says which blocks, readers and output.

    Attributes:
        order: the blocks that ran, by their numbers.
        parts: where a block's hidden states are in what it returns.
        made: those hidden states.
        outputs: all that the last block returned, marked.
        made_of: the marks that every output of a block was made of, by way of no other mark.
        inputs: the marks that they were made of, by way of no other mark.
        places: where a block finds h_l among its arguments, by boundary.
        repeated: where else it finds the same tensor.
        read: h_l as it finds it.
        heads: how often the module ran whose output may be y; ``logits`` is the first output, ``head_marks`` its marks.
        output: what the model returned.
        error: what it raised behind the last block.
        changed: names of the parameters that it changed.
        labels: the labels that it was called with.
        apart: whether blocks have made something beside their hidden states that does not depend on those before.
        sums: what is seen of residual sums that are made outside of blocks.
        idle: whether a block ran without gradients; ``hidden_graph``, whether inside a reentrant checkpoint.
    """

    def __init__(self, model: nn.Module, boundaries: Boundaries) -> None:
        self.model, self.boundaries = model, boundaries
        self.order: list[int] = []
        self.parts: dict[int, nested.Path] = {}  # where a block's hidden states are in its output
        self.made: dict[int, Tensor] = {}  # those of each block, marked
        self.inputs: dict[int, set[tuple[int, nested.Path]]] = {}  # the marks that a block's output was made of
        self.made_of: dict[tuple[int, nested.Path], set[tuple[int, nested.Path]]] = {}  # the same of each output
        self.outputs: dict[nested.Path, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.places: dict[int, nested.Path] = {}
        self.repeated: dict[int, list[nested.Path]] = {}
        self.read: dict[int, Tensor] = {}  # h_l as the next block reads it
        self.again, self.heads = False, 0
        self.head_marks: set[tuple[int, nested.Path]] = set()
        self.logits: Tensor | None = None
        self.output: Any = None
        self.error: Exception | None = None
        self.changed: list[str] = []
        self.labels: list[Tensor] = []
        self.apart = self.hidden_graph = self.idle = False
        self.sums, self._said = Sums(), set[int]()
        behind = zip(boundaries.readers, boundaries.blocks[1:], strict=True)
        self._channels = Channels([readers[0] if readers else block for readers, block in behind])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks that see, and take them off again."""
        handles: list[RemovableHandle] = []
        boundaries = self.boundaries
        try:
            for index, block in enumerate(boundaries.blocks):
                hook = Hook(self._block_hook(index))
                handles.append(ends(block)[1].register_forward_hook(hook, prepend=bool(_readers(boundaries, index))))
            for index, readers in enumerate(boundaries.readers):
                for reader in readers:
                    hook = Hook(self._reader_hook(index))
                    handles.append(ends(reader)[0].register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            if not boundaries.hidden:
                handles.append(boundaries.output.register_forward_hook(Hook(self._head_hook), prepend=True))
            for module in set(self.model.modules()).difference(*(block.modules() for block in boundaries.blocks)):
                handles.append(
                    module.register_forward_pre_hook(Hook(partial(self.sums.at_module, self)), with_kwargs=True)
                )
            with self._channels.watched():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _block_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if not torch.is_grad_enabled():
                self.idle, self.hidden_graph = True, self.hidden_graph or in_reentrant_checkpoint()
                return None
            if in_backward():  # a checkpointed segment runs again
                return nested.map_tensors(output, lambda t: Mark.apply(t, None) if t.is_floating_point() else t)
            path = self._part(index, output)
            if path is None or nested.get(output, path).ndim < 2:
                raise no_hidden_states(index, self.boundaries.blocks[index], output)
            self.again = self.again or (bool(self.order) and len(self.order) == len(self.boundaries.blocks))
            if self.again:  # a further forward for the same loss
                if index == 0 and any(k == len(self.boundaries) for k, _ in marks_of([nested.get(output, path)])):
                    self.order.append(index)
                return None
            self.order.append(index)
            if len(self.order) != index + 1:
                return None
            self.parts[index] = path
            floating = [(p, t) for p, t in nested.tensors(output) if t.is_floating_point()]
            self.made_of |= {(index, p): marks_of([t]) for p, t in floating}
            self.inputs[index] = self.made_of[index, path]
            if index - 1 in self.parts:
                main = index - 1, self.parts[index - 1]
                beside = [self.made_of[index, p] for p, t in floating if p != path and self._learned(index, t)]
                self.apart |= any(marks and main not in marks for marks in beside)
            for p, t in floating:
                mark = index, self.sums.main(self, index) if p == path else p
                marked = Mark.apply(t if t.requires_grad else t.detach().requires_grad_(), mark)
                output = nested.put(output, p, marked)
                self.outputs = {**self.outputs, p: marked} if index == len(self.boundaries) else {}
            self.made[index] = nested.get(output, path)
            self.versions[index] = self.made[index]._version
            return output

        return hook

    def _part(self, index: int, output: Any) -> nested.Path | None:
        """Where the hidden states are: the first output that the block's own weights had a part in.

        Where the first block whose output is read has them comes before others. Where no weights learn, or the block
        does nothing this time, they are there, or come first.
        """
        places = [path for path, t in nested.tensors(output) if t.is_floating_point()]
        usual = next(iter(self.parts.values()), None)
        if usual in places:
            places = [usual, *places]
        made = (p for p in places if self._learned(index, nested.get(output, p)))
        return next(made, next(iter(places), None))

    def _learned(self, index: int, t: Tensor) -> bool:
        """Whether the block's own weights had a part in what it returned."""
        own = {id(p) for p in self.boundaries.blocks[index].parameters()}
        return bool(own & parameters_of([t], ends=is_mark))

    def unseen(self) -> str:
        """Say why no block was seen to run with gradients."""
        blocks = self.boundaries.blocks
        if self.hidden_graph:
            return (
                "the blocks run inside a checkpoint that makes their graph in the backward, where it cannot be cut. "
                f"{REENTRANT} In a forward of your own call checkpoint(..., use_reentrant=False)."
            )
        if any(isinstance(module, GraphModule) for module in self.model.modules()):
            return (
                "no block was called: torch.fx has traced the model, which calls what is inside of blocks and never "
                "these. Train the model itself and trace it afterwards, or trace it with blocks as leaves "
                "(`torch.fx.Tracer.is_leaf_module`)."
            )
        about = f"these blocks ({len(blocks)} of them, the first a {type(blocks[0]).__name__})"
        if self.idle and not any(p.requires_grad for block in blocks for p in block.parameters()):
            return (
                f"{about} ran without gradients, and nothing in them trains: expected blocks of what trains. Name "
                "those with the option `blocks`."
            )
        return (
            f"no forward with gradients ran through the blocks inside `compute_loss`. {NO_GRADIENTS} If the model "
            f"does not call {about}, or calls their `forward` itself, which no hook sees, name others with the option "
            "`blocks`."
        )

    def say_apart(self) -> None:
        """Warn of blocks that hand on several streams, of which one is cut."""
        if self.apart:
            logger.warning(
                "GrAPE: blocks hand on several tensors that do not depend on each other (a list with one for each "
                "sample?), and direct feedback reaches one of them; the others are trained by ordinary "
                "backpropagation. Put them into one, padded, if they are the hidden states."
            )

    def _reader_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not torch.is_grad_enabled() or self.again or index in self.read or index not in self.made:
                return
            if in_backward():
                return
            reading = [
                (path, t, {p for k, p in marks_of([t]) if k == index})
                for path, t in nested.tensors((args, kwargs))
                if t.is_floating_point() and t.requires_grad
            ]
            reading = [(path, t, parts) for path, t, parts in reading if parts]
            main = [(path, t) for path, t, parts in reading if self.sums.main(self, index) in parts]
            # Where the hidden states are not what comes first in the block's output.
            if not main and reading and not self.boundaries.in_place:
                self.parts[index] = min(reading[0][2], key=str)
                self.made[index] = reading[0][1]
                main = [(path, t) for path, t, parts in reading if self.parts[index] in parts]
            if not main:
                return
            (path, h), *more = main
            if any(other is not h for _, other in more):
                return self.sums.at_several(self, index)
            self.places[index], self.read[index] = path, h
            self.repeated[index] = [other for other, _ in more]
            self.sums.at_reader(self, index, h)

        return hook

    def _head_hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        path = nested.first_floating(output)
        if not torch.is_grad_enabled() or path is None or len(self.order) < len(self.boundaries.blocks):
            return None
        if in_backward():
            return nested.put(output, path, Mark.apply(nested.get(output, path), None))
        if self.again:
            return None
        self.heads += 1
        logits = nested.get(output, path)
        if self.heads > 1:
            return None
        self.head_marks = marks_of([logits])
        self.logits = Mark.apply(
            logits if logits.requires_grad else logits.detach().requires_grad_(), (len(self.boundaries.blocks), ())
        )
        return nested.put(output, path, self.logits)

    @property
    def hidden_y(self) -> Tensor:
        """What y is in hidden space: the last block's output, or the sum of that and of what it was given."""
        return self.made[len(self.boundaries)] if self.sums.y is None else self.sums.y

    @property
    def copied(self) -> set[int]:
        """Boundaries whose h_l is changed in place by what reads it."""
        return {i for i in range(len(self.boundaries)) if self.made[i]._version > self.versions[i]}

    @property
    def channels(self) -> tuple[bool, bool]:
        """Where blocks have their channels: ``channels_first`` and ``channels_last`` of a ``Layout``."""
        return self._channels.found({index: h.shape for index, h in self.made.items()})

    @property
    def around(self) -> bool:
        """Whether a block, or the head, works on what an earlier block than the one before has made, too."""
        carried, read = self.carried(), self.inputs | {len(self.boundaries.blocks): self.head_marks}
        return any(k < index - 1 or (k, p) in carried for index, marks in read.items() for k, p in marks)

    def tokens(self, layout: Layout) -> bool:
        """Whether the last block hands on tokens, or positions of a map, which share B_l.

        For these the error is best measured there, also where a classifier makes fewer numbers of them: what it reads,
        and by which weights, is in the error then, and need not be learned (LOG.md, 29 November 2026).
        """
        return layout.shares(self.made[len(self.boundaries)].ndim)

    def scattered(self, layout: Layout) -> str:
        """Say how the head's output and the last block's differ in positions; empty if they do not, or it has one."""
        last = self.made[len(self.boundaries)]
        if self.logits is None or len(self.logits) != len(last):
            return ""
        y, h = (layout.vectors(t.detach()).shape[1] for t in (self.logits, last))
        return "" if y in (1, h) else f"{y} of these, and {h} of those"

    def carried(self) -> set[tuple[int, nested.Path]]:
        """What a block returns beside its hidden states and has made of those of blocks before it."""
        found: set[tuple[int, nested.Path]] = set()
        for (index, path), marks in self.made_of.items():
            if path != self.parts[index] and any(self.parts[k] == p or (k, p) in found for k, p in marks):
                found.add((index, path))
        return found


def _readers(boundaries: Boundaries, index: int) -> list[nn.Module]:
    return boundaries.readers[index] if index < len(boundaries) else [boundaries.blocks[-1]]
