"""Hooks on a model's blocks, where its graph is cut.

Between block l and the next lies the boundary activation h_l; the error e = dLoss/dy is measured at the output y of
the last block (`hidden`) or of the head (`logits`). Hooks are attached once for a training run, and a mode, always set
by a ``with``, says what they do in a step; without a mode the model is its own BP twin:

- ``broadcast``: cut the graph at each h_l, and send e to all of them at once: delta_l = B_l e. The graph becomes a
  star whose arms, the local backwards of the blocks, have no order between them.
- ``record``: keep h_l and y of an ordinary forward, for the exact delta_l.
- ``perturb``: replace each h_l by what a function returns for it, and hand out y (forward-mode estimates).

h_l is cut where the next block reads it (``readers``), so that whoever else reads it, an auxiliary head or a loss on
hidden states, has its graph, and block l the exact gradient of that loss beside B_l e. What lies between two blocks is
of one unit with the first of them. Without ``readers`` h_l is cut where block l makes it, for all who read it.

``h``, ``e`` and ``y`` are seen as vectors, ``(batch, positions, n)``, and paired as ``layout.py`` says: where y has
other positions than h_l (a classifier), e_b is summed over positions and the same B_l e_b goes to each position of h_l.
So it is for the blocks of an encoder below a decoder (``pooled``), whose output is cut like any h_l.

What else a block hands on, or the model hands to its blocks, keeps its gradient, which is exact and local: it runs from
a block's own error along that path, up to the next cut, and no further. Such paths are a position bias computed in
block 1 and used in all (T5), inputs made for each layer from the embeddings (Gemma 3n), a router's loss (mixtures).

Where a block is left out (LayerDrop), h_l is what the next one reads, and y the output of the last block that ran.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grape_hf.core import nested
from grape_hf.core.backward_effects import BackwardEffects
from grape_hf.core.block_hooks import BlockHook, OutputHook, ReaderHook
from grape_hf.core.block_lists import ends
from grape_hf.core.broadcast import NO_REFINEMENT, BroadcastMode, Keep, Refinement
from grape_hf.core.hooks import Hook
from grape_hf.core.layout import AUTO, Layout, Pairing
from grape_hf.core.modes import Forward, Mode, OutputReached, PerturbMode, RecordMode
from grape_hf.core.star import Matrix

if TYPE_CHECKING:
    from grape_hf.core.calls import Calls

logger = logging.getLogger(__name__)

ReadAt = Literal["first", "last"]


class OutputNotReachedError(RuntimeError):
    """A forward ended, and the module whose output is y was never called."""


class Boundaries:
    """The feedback points h_1 .. h_{L-1} of a model and its output y.

    Args:
        blocks: the blocks whose outputs are h_1 .. h_L, in order. To let several blocks share one feedback point
            leave out all but the last of each group.
        output: the module whose output is y; the last block by default.
        layout: how activations are seen as vectors.
        whole: whether a forward must run to its end even when nothing behind y matters (FSDP2 counts on that).
        pooled: boundaries of another sequence than y's: blocks of an encoder.
        readers: for each boundary the blocks that read h_l; by default h_l is cut at the output of block l.
        calls: what the model is called with, for padding; without it there is the padding that a mode is given.

    Attributes:
        copied: boundaries whose h_l the next block changes in place, which therefore gets a copy (``probe``).
        around: whether later blocks than the next, or y, read what a block has made, too (``probe``).
        in_place: whether h_l is a sum that the model makes outside of blocks (``in_place.py``, ``probe``).
        end: the module that reads y where y is such a sum.
        sizes: n_l of each h_l, and n_y, which every forward that counts must have; any by default.
        read_at: where the loss reads y if that is one position alone, or two of many; None if it is not.
        spread: whether an error at one position of y stays there, and all get its mean; else all get the sum.
        mixed: boundaries where all get the mean besides, as nothing at positions with an error is made of h_l (probe).
        read: ``read_at`` for the samples of the next estimate, ``(batch, positions)``, by the error of a step.
        last_checked: whether it was seen in a step that all of h_L's gradient comes by way of y, the output of a head.
        places: where a block finds h_l among its arguments, by boundary; the first floating-point tensor by default.
        repeated: where else it finds the same tensor.
        parts: where the hidden states are in what a block returns, by its number; the same by default.

    Raises:
        ValueError: if there is no block.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        output: nn.Module | None = None,
        layout: Layout = AUTO,
        whole: bool = False,
        pooled: Collection[int] = (),
        readers: Sequence[Sequence[nn.Module]] | None = None,
        calls: "Calls | None" = None,
    ) -> None:
        if not blocks:
            raise ValueError("expected at least one block, got none.")
        self.blocks = list(blocks)
        last = ends(self.blocks[-1])[1]
        self.output = last if output is None else output
        self.hidden = self.output is last
        self.layout, self.whole, self.pooled, self.calls = layout, whole, frozenset(pooled), calls
        self.readers = [[] for _ in self.blocks[1:]] if readers is None else [list(r) for r in readers]
        self.copied, self.mixed = set[int](), set[int]()
        self.around = self.spread = self.in_place = self.last_checked = self._warned = False
        self.end: nn.Module | None = None
        self.sizes: list[int] | None = None
        self.read_at: ReadAt | None = None
        self.read: Tensor | None = None
        self.places, self.parts = dict[int, nested.Path](), dict[int, nested.Path]()
        self.repeated: dict[int, list[nested.Path]] = {}
        self._mode: Mode | None = None
        self._read_before: dict[int, tuple[Mode, Tensor, Any, Tensor]] = {}  # by a decoder's earlier blocks
        self.effects = BackwardEffects(nn.ModuleList(self.blocks) if calls is None else calls.model, self.output)

    def __len__(self) -> int:
        """Count the feedback points, L - 1."""
        return len(self.blocks) - 1

    @property
    def skips(self) -> bool:
        """Whether y is found even if the last blocks are left out of a forward."""
        return self.hidden and self.end is None and all(self.readers)

    @property
    def current_call(self) -> Any:
        """The call of the model under way, None if nobody looks, or looking would have each step compiled anew."""
        return None if self.calls is None or torch.compiler.is_compiling() else self.calls.current or self.calls.loss

    def check_size(self, index: int, h: Tensor) -> None:
        """Raise ValueError if h_l has another size than its B_l was made for, or y than all of them were."""
        if self.sizes is None or (found := self.layout.width(h.shape)) == self.sizes[index]:
            return
        if index == len(self.blocks) - 1:
            raise ValueError(
                f"expected y, the output of the {type(self.output).__name__} that the error is measured at, as vectors "
                f"of {self.sizes[index]:,} numbers as at the first step, got {tuple(h.shape)}, which is {found:,} "
                "each. Resize it before train(), or call train() again, which makes feedback for what is there."
            )
        otherwise = 'use feedback_sharing="position"'
        if self.layout.shares(h.ndim):  # positions share B_l already
            otherwise = "have the blocks hand on (batch, positions, channels)"
        raise ValueError(
            f"feedback_sharing={self.layout.sharing!r} makes B_{index + 1} for samples of one size: expected "
            f"h_{index + 1}, the output of block {index + 1}, as vectors of {self.sizes[index]:,} numbers as at the "
            f"first step, got {tuple(h.shape)}, which is {found:,} each. Bring all samples to one size (pad, crop), or "
            f"{otherwise}."
        )

    def pairing(self, index: int, h: Tensor, mask: Tensor | None = None) -> Pairing:
        """Return how h_l goes together with e.

        Args:
            index: of the boundary.
            h: h_l.
            mask: padding, if it is not to be taken from what the model was called with.
        """
        pooled, one = index in self.pooled, self.read_at is not None
        summed, spread = pooled or (one and not self.spread), one or index in self.mixed
        if mask is not None:  # an encoder's mask says nothing about the positions of its decoder
            return Pairing(self.layout, summed, spread, mask if pooled or not self.pooled else None)
        padding = None if self.calls is None else self.calls.masks.padding(self.blocks[index], self.layout.tokens(h))
        return Pairing(self.layout, summed, spread, padding)

    def read_of(self, y: Tensor, padding: Tensor | None) -> Tensor | None:
        """Return where the loss reads y, ``(batch, positions)``; None if that is everywhere, or not known."""
        if self.read_at is None:
            return None
        batch, positions = self.layout.vectors(y).shape[:2]
        if self.read is not None and self.read.shape == (batch, positions):
            return self.read
        places = torch.arange(positions, device=y.device).expand(batch, positions)
        if self.read_at == "first":
            return places == 0
        if padding is None or padding.shape != (batch, positions):
            return places == positions - 1
        last = (places * (padding != 0).to(places)).amax(1, keepdim=True)
        return places == last

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks, which do nothing outside a mode, and take every one of them off again at the end."""
        handles: list[RemovableHandle] = []
        try:
            hooks = [BlockHook(self, index, block) for index, block in enumerate(self.blocks)]
            for of_block in hooks:
                first, last = ends(of_block.block)
                if first is not last:
                    handles.append(first.register_forward_pre_hook(Hook(of_block.at_input), with_kwargs=True))
                # Ahead of others, which then see what the next module does; a cut comes behind them.
                ahead = not of_block.cuts
                hook = Hook(of_block.at_output)
                handles.append(last.register_forward_hook(hook, with_kwargs=True, prepend=ahead))
            for reader in dict.fromkeys(module for readers in self.readers for module in readers):
                # Behind others, which then see h_l with its graph; but ahead of FSDP2's, and where h_l is known by
                # being the same for all readers.
                ahead = self.whole or any(reader in self.readers[index] for index in self.pooled)
                hook = Hook(ReaderHook(self, reader, hooks).at_input)
                handles.append(ends(reader)[0].register_forward_pre_hook(hook, with_kwargs=True, prepend=ahead))
            of_y = OutputHook(self)
            if not self.hidden:
                handles.append(self.output.register_forward_hook(Hook(of_y.at_output), prepend=True))
            elif self.end is not None:
                handles.append(self.end.register_forward_pre_hook(Hook(of_y.at_input), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def broadcast(
        self,
        B: Sequence[Matrix | None],
        mask: Tensor | None = None,
        keep: Keep = "nothing",
        refinement: Refinement = NO_REFINEMENT,
    ) -> Iterator[list[Forward]]:
        """Send dLoss/dy to every block at once, by the matrices B_1 .. B_{L-1}, each ``(n_l, n_y)``.

        Block 1 and whatever feeds it (embeddings, stem) are one unit with local backpropagation; block L and what
        follows get their exact gradient. Enclose the forward and the backward. A forward without gradients in between
        (generation) is left alone; several forwards for one loss are a star each. A forward that ends before y, where
        that is a head, leaves its blocks without an error: a warning says so, once.

        Args:
            B: the feedback matrices; "identity" saves the product with one; None where a boundary is not to be cut, and
                the gradient of the block after it flows through.
            mask: ``(batch, positions)``, nonzero where a position is not padding.
            keep: what of each forward is handed out: h_l and y, the error e that a backward leaves, what is sent.
            refinement: maps that learn from the backward, and sweeps over the deltas.

        Raises:
            RuntimeError: if the blocks do not run once each, in order, up to y, or if a block's output carries no
                gradient although it has weights to train: the gradients would be silently wrong.
        """
        mode = BroadcastMode(self, list(B), mask, keep, refinement)
        with self._in_mode(mode):
            try:
                yield mode.forwards
            finally:
                mode.close()
        if mode.unheard and not self.skips and not self._warned:  # without its last blocks a model may lead to no loss
            self._warned = True
            logger.warning(
                f"GrAPE: the blocks ran, and the {type(self.output).__name__} whose output the error is measured at "
                "never did, so that all but the last got no error from this batch. Losses that do not use this head, "
                'or not in every batch, want feedback_space="hidden". This is said once.'
            )

    @contextmanager
    def record(self, mask: Tensor | None = None) -> Iterator[list[Forward]]:
        """Keep h_l and y of each forward with gradients, and have an ordinary backward leave delta_l and e there.

        Args:
            mask: as for ``broadcast``.
        """
        mode = RecordMode(self, mask)
        with self._in_mode(mode):
            yield mode.forwards

    @contextmanager
    def perturb(self, inject: Callable[[int, Tensor, nn.Module, tuple, dict], Tensor]) -> Iterator[Forward]:
        """Replace h_l by ``inject(index, h, block, args, kwargs)`` in one forward, of which nothing behind y counts.

        Where this is entered with gradients enabled, a forward without them that comes first (generation, a reference
        model) is left alone, as in the other modes; ``inject`` may disable gradients when it is called first. The
        forward is cut short by an exception that this manager catches; where it must be ``whole``, it goes on with y
        alone, without tangent or graph. ``forward.y`` holds y afterwards; ``args`` and ``kwargs`` are the block's.

        Raises:
            OutputNotReachedError: if the forward ended without reaching y.
        """
        mode = PerturbMode(self, inject)
        with self._in_mode(mode), suppress(OutputReached):
            yield mode.forward
        if mode.forward.y is None:
            raise OutputNotReachedError(
                f"the forward ended before y, the output of the {type(self.output).__name__}, was computed. trl and "
                'fused kernels compute the loss without calling the head: use feedback_space="hidden".'
            )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the current mode for a while, to run a block inside it without being seen."""
        with self._in_mode(None):
            yield

    @contextmanager
    def _in_mode(self, mode: "Mode | None") -> Iterator[None]:
        previous, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = previous
            if mode is not None:  # else ``off``, inside a mode whose decoder has more blocks to come
                self._read_before.clear()
