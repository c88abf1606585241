"""Hooks on a model's blocks: the only file that touches the model.

At the output of block l < L lies the boundary activation h_l; the error e = dLoss/dy is measured at the output y of
the last block (`hidden`) or of the head (`logits`). Hooks are attached once, for the length of a training run, and a
mode, always set by a ``with``, says what they do in a step; without a mode the model is its own BP twin:

- ``broadcast``: cut the graph at each h_l, and send e to all of them at once: delta_l = B_l e. The graph becomes a
  star whose arms, the local backwards of the blocks, have no order between them.
- ``record``: keep h_l and y of an ordinary forward, for the exact delta_l.
- ``perturb``: replace each h_l by what a function returns for it, and hand out y (forward-mode estimates).

``h``, ``e`` and ``y`` are seen as vectors, ``(batch, positions, n)`` (``layout.py``). Where y has other positions than
h_l (a classifier), e_b is summed over positions and the same B_l e_b goes to each position of h_l. So it is for the
blocks of an encoder below a decoder (``pooled``), whose output is cut like any h_l.

Only the h_l are cut. What else a block hands on, or the model hands to its blocks, keeps its gradient, which is exact
and local: it runs from a block's own error along that path, up to the next cut, and no further. Such paths are a
position bias computed in block 1 and used in all (T5), inputs made for each layer from the embeddings (Gemma 3n), the
norm between an encoder and the attention of all decoder blocks to it, a router's loss (mixtures of experts).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grape_hf.blocks import ends
from grape_hf.layout import AUTO, Layout
from grape_hf.modes import BroadcastMode, Forward, Mode, OutputReached, PerturbMode, RecordMode
from grape_hf.star import Matrix


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
        pooled: boundaries of another sequence than y's: blocks of an encoder. Only they have padding to mask then.

    Attributes:
        copied: boundaries whose h_l the next block changes in place, which therefore gets a copy (``probe``).
        sizes: n_l of each h_l, which every forward that counts must have; any by default.

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
    ) -> None:
        if not blocks:
            raise ValueError("expected at least one block, got none.")
        self.blocks = list(blocks)
        self.output = ends(self.blocks[-1])[1] if output is None else output
        self.layout, self.whole, self.pooled = layout, whole, frozenset(pooled)
        self.copied: set[int] = set()
        self.sizes: list[int] | None = None
        self._mode: Mode | None = None

    def __len__(self) -> int:
        """Count the feedback points, L - 1."""
        return len(self.blocks) - 1

    def check_size(self, index: int, h: Tensor) -> None:
        """Raise ValueError if h_l has another size than its B_l was made for."""
        if self.sizes is None or (found := self.layout.width(h.shape)) == self.sizes[index]:
            return
        raise ValueError(
            f"feedback_sharing={self.layout.sharing!r} makes B_{index + 1} for samples of one size: expected "
            f"h_{index + 1}, the output of block {index + 1}, as vectors of {self.sizes[index]:,} numbers as at the "
            f"first step, got {tuple(h.shape)}, which is {found:,} each. Bring all samples to one size (pad, crop), or "
            'use feedback_sharing="position".'
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks, which do nothing outside a mode, and take every one of them off again at the end."""
        handles: list[RemovableHandle] = []
        try:
            for index, block in enumerate(self.blocks[:-1]):
                first, last = ends(block)
                hook = _BoundaryHook(self, index, block)
                if first is not last:
                    handles.append(first.register_forward_pre_hook(hook.at_input, with_kwargs=True))
                handles.append(last.register_forward_hook(hook.at_output, with_kwargs=True))
            handles.append(self.output.register_forward_hook(self._output_hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def broadcast(
        self, B: Sequence[Matrix | None], mask: Tensor | None = None, keep: bool = False
    ) -> Iterator[list[Forward]]:
        """Send dLoss/dy to every block at once, by the matrices B_1 .. B_{L-1}, each ``(n_l, n_y)``.

        Block 1 and whatever feeds it (embeddings, stem) are one unit with local backpropagation; block L and what
        follows get their exact gradient. Enclose the forward and the backward. A forward without gradients in between
        (generation) is left alone; several forwards for one loss are a star each.

        Args:
            B: the feedback matrices; "identity" saves the product with one; None where a boundary is not to be cut, and
                the gradient of the block after it flows through.
            mask: ``(batch, positions)``, nonzero where a position is not padding.
            keep: hand out h_l and y of each forward, where a backward leaves e in ``y.grad``; else the list is empty.

        Raises:
            RuntimeError: if the blocks do not run once each, in order, up to y, or if a block's output carries no
                gradient although it has weights to train: the gradients would be silently wrong.
        """
        mode = BroadcastMode(self, list(B), mask, keep)
        with self._in_mode(mode):
            yield mode.forwards
            mode.close()

    @contextmanager
    def record(self) -> Iterator[list[Forward]]:
        """Keep h_l and y of each forward with gradients, and have an ordinary backward fill their ``grad``."""
        mode = RecordMode(self)
        with self._in_mode(mode):
            yield mode.forwards

    @contextmanager
    def perturb(self, inject: Callable[[int, Tensor, nn.Module, tuple, dict], Tensor]) -> Iterator[Forward]:
        """Replace h_l by ``inject(index, h, block, args, kwargs)`` in one forward, of which nothing behind y counts.

        Where this is entered with gradients enabled, a forward without them that comes first (generation, a reference
        model) is left alone, as in the other modes; ``inject`` may disable gradients when it is called first.
        The forward is cut short by an exception that this manager catches, so nothing behind y is computed; where it
        must be ``whole``, it goes on with y alone, without tangent or graph.
        ``forward.y`` holds y afterwards; the last two arguments of ``inject`` are what the block was called with.

        Raises:
            OutputNotReachedError: if the forward ended without reaching y.
        """
        mode = PerturbMode(inject, self.whole, self.check_size)
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

    def _output_hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._mode is None:
            return None
        if isinstance(output, tuple | list):
            return type(output)((self._mode.at_output(output[0]), *output[1:]))
        return self._mode.at_output(output)


class _BoundaryHook:
    """The hooks of one block: at its output, and at its input where it is a part of a plain stack."""

    def __init__(self, boundaries: Boundaries, index: int, block: nn.Module) -> None:
        self.boundaries, self.index, self.block = boundaries, index, block
        self.inputs: tuple[tuple, dict] | None = None

    def at_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(self.boundaries._mode, PerturbMode):
            self.inputs = args, kwargs

    def at_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        mode = self.boundaries._mode
        if mode is None:
            return None
        args, kwargs = self.inputs or (args, kwargs)
        self.inputs = None
        # A block returns its hidden states, or a tuple or list that starts with them.
        if isinstance(output, tuple | list):
            h = mode.at_boundary(self.index, output[0], self.block, args, kwargs)
            return type(output)((h, *output[1:]))
        return mode.at_boundary(self.index, output, self.block, args, kwargs)
