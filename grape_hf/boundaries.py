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
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from grape_hf.blocks import ends
from grape_hf.layout import AUTO, Layout, align_positions

Matrix = Tensor | Literal["identity"]


def project_error(
    e: Tensor,
    B: Matrix,
    h_shape: torch.Size,
    mask: Tensor | None = None,
    layout: Layout = AUTO,
    pooled: bool = False,
) -> Tensor:
    r"""Return delta_l = B_l e for every position of h_l.

    Args:
        e: dLoss/dy in the shape of y.
        B: feedback matrix, ``(n_l, n_y)``, or "identity". The product is computed in the dtype of e.
        h_shape: shape of h_l, which is the shape of the result.
        mask: ``(batch, positions)``, nonzero where a position is not padding; needed only where one error per sample
            goes to several positions.
        layout: how h_l and e are seen as vectors.
        pooled: whether h_l is of another sequence than e, so that e is summed over positions in any case.
    """
    e = layout.vectors(e)
    n_l = e.shape[-1] if isinstance(B, str) else B.shape[0]
    batch, positions = h_shape[0], h_shape.numel() // (h_shape[0] * n_l)
    e = align_positions(e, positions, pooled)
    delta = e if isinstance(B, str) else e.to(B.device) @ B.mT.to(e.dtype)  # (batch, positions or 1, n_l)
    if delta.shape[1] != positions:
        delta = delta.expand(batch, positions, n_l)
        if mask is not None and mask.shape == (batch, positions):
            delta = delta * mask.to(delta)[..., None]
    return layout.restore(delta, h_shape)


def own_mask(mask: Tensor | None, index: int, pooled: frozenset[int]) -> Tensor | None:
    """Return the padding mask for one boundary: an encoder's says nothing about the positions of its decoder."""
    return mask if index in pooled or not pooled else None


class _Star:
    """Where the error of one forward waits for the blocks: the node at y puts it in, the nodes at each h_l read it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.e: Tensor | None = None


class _Receive(torch.autograd.Function):
    """Stand between h_l and the error: backward turns e into delta_l, when block l's turn comes and not before.

    Forward returns a scalar stand-in, by which ``_Broadcast`` knows this node. As the node is made right after
    block l, autograd runs it right before block l's backward: one delta_l at a time is in memory, whatever the depth.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, B: Matrix, star: _Star, mask: Tensor | None, pooled: bool) -> Tensor:
        ctx.B, ctx.star, ctx.mask, ctx.pooled = B, star, mask, pooled
        ctx.h_shape, ctx.dtype, ctx.device = h.shape, h.dtype, h.device
        return h.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        assert ctx.star.e is not None, "the error arrives before any block is reached"
        star = ctx.star
        delta = project_error(star.e, ctx.B, ctx.h_shape, ctx.mask, star.layout, ctx.pooled)
        return delta.to(ctx.device, ctx.dtype), None, None, None, None


class _Broadcast(torch.autograd.Function):
    """Identity on y; backward hands the error e to y's own graph and, by the star, to every ``_Receive`` node."""

    @staticmethod
    def forward(ctx: Any, star: _Star, y: Tensor, *receivers: Tensor) -> Tensor:
        ctx.star, ctx.receivers = star, [(r.dtype, r.device) for r in receivers]
        # Not a view: FSDP2 warns of views, whose pre-backward hook an in-place operation would drop.
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        ctx.star.e = e
        return (None, e, *(torch.zeros((), dtype=dtype, device=device) for dtype, device in ctx.receivers))


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
        self._mode: _Mode | None = None

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
        mode = _BroadcastMode(self, list(B), mask, keep)
        with self._in_mode(mode):
            yield mode.forwards
            mode.close()

    @contextmanager
    def record(self) -> Iterator[list[Forward]]:
        """Keep h_l and y of each forward with gradients, and have an ordinary backward fill their ``grad``."""
        mode = _RecordMode(self)
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
        mode = _PerturbMode(inject, self.whole, self.check_size)
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
    def _in_mode(self, mode: "_Mode | None") -> Iterator[None]:
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
        if isinstance(self.boundaries._mode, _PerturbMode):
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


class _Mode:
    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        raise NotImplementedError

    def at_output(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class _BroadcastMode(_Mode):
    def __init__(self, boundaries: Boundaries, B: list[Matrix | None], mask: Tensor | None, keep: bool) -> None:
        self.B, self.mask, self.check_size = B, mask, boundaries.check_size
        self.layout, self.copied, self.pooled = boundaries.layout, boundaries.copied, boundaries.pooled
        self.star = _Star(self.layout)  # of the forward under way
        self.keep, self.forwards = keep, list[Forward]()
        self.outputs: list[Any] = []  # where the stars of earlier forwards begin
        self.waiting: dict[int, Tensor | None] = {}  # by boundary; None where nothing before it is trained

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
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
            self.waiting[index] = _Receive.apply(h, B, self.star, mask, index in self.pooled)
        elif any(p.requires_grad for p in block.parameters()):
            raise RuntimeError(
                f"the output of block {index + 1} ({type(block).__name__}) carries no gradient although the block has "
                "weights to train. Reentrant activation checkpointing does this: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        return h.detach().clone() if index in self.copied else h.detach()

    def at_output(self, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        receivers = [r for r in self.waiting.values() if r is not None]
        if receivers:
            y = _Broadcast.apply(self.star, y, *receivers)
            self.outputs.append(y.grad_fn)
        if self.keep and self.waiting:
            self.forwards[-1].y = _keep_grad(y)
        self.waiting, self.star = {}, _Star(self.layout)  # a further forward for the same loss is a star of its own
        return y

    def close(self) -> None:
        if self.waiting:
            raise RuntimeError(
                f"blocks 1 to {max(self.waiting) + 1} ran, and the module whose output is y never did, so they got no "
                "error. Was the head left out of the forward?"
            )


class _RecordMode(_Mode):
    def __init__(self, boundaries: Boundaries) -> None:
        self.check_size = boundaries.check_size
        self.layout, self.copied, self.pooled = boundaries.layout, boundaries.copied, boundaries.pooled
        self.forwards: list[Forward] = []

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        if torch.is_grad_enabled():
            self.check_size(index, h)
            if index == 0 or not self.forwards:
                self.forwards.append(Forward(self.layout, pooled=self.pooled))
            self.forwards[-1].h[index] = _keep_grad(h)
            return h.clone() if index in self.copied else h
        return h

    def at_output(self, y: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.forwards:
            self.forwards[-1].y = _keep_grad(y)
        return y


class _PerturbMode(_Mode):
    def __init__(
        self,
        inject: Callable[[int, Tensor, nn.Module, tuple, dict], Tensor],
        whole: bool,
        check_size: Callable[[int, Tensor], None],
    ) -> None:
        self.inject, self.whole, self.check_size, self.forward = inject, whole, check_size, Forward()
        self.under_way = not torch.is_grad_enabled()  # else the forward meant begins with gradients

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        if self.forward.y is not None:  # a further forward for the same loss
            return h
        self.under_way = self.under_way or torch.is_grad_enabled()
        if not self.under_way:
            return h
        self.check_size(index, h)
        return self.inject(index, h, block, args, kwargs)

    def at_output(self, y: Tensor) -> Tensor:
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
