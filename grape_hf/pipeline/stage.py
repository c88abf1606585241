"""What one stage does with one micro-batch: forward, backward, or the two parts of a star's backward.

``FeedbackStage`` is torch's ``PipelineStage`` for a ``StageModel``. Its forward runs the Trainer's own loss on a
micro-batch; on all stages but the last that ends where the next stage begins. In a star the graph is cut at the stage's
feedback points: the end of every stage, and, with one point a block, behind each of its blocks. A cut hands on a
detached copy and keeps the original, from which the local backward starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from grape_hf.core.backward_effects import REENTRANT
from grape_hf.core.broadcast import check_gradient, refuse_recomputed
from grape_hf.core.hooks import Hook
from grape_hf.core.star import autocast_dtype
from grape_hf.pipeline.feedback import StageFeedback
from grape_hf.pipeline.look import Extent
from grape_hf.pipeline.places import Places
from grape_hf.pipeline.split import StageEndError, StageModel

# Computes the loss of a micro-batch, by its number, as this stage's share of the whole.
Loss = Callable[[int], Tensor]


class StageModule(nn.Module):
    """The module that torch's stage runs: a micro-batch's loss, or the hidden states that leave the stage.

    Args:
        split: this stage of the model.
        places: of this process.
        device: where it computes.
        points: blocks of this stage with a feedback point behind them, by their number in the chain.

    Attributes:
        loss: computes a micro-batch's loss; set for each batch.
        number: of the micro-batch that comes next.
        extent: of each micro-batch.
        star: whether the next forward is cut at the feedback points.
        learning: whether maps learn from what blocks send to their inputs.
        recording: whether an ordinary backward shall leave exact deltas in ``exact``.
        cut: by point, the hidden states that the local backward starts from.
        inputs: by point, what the block behind it reads; kept for maps that learn.
        y: the last block's output, detached, at which e is measured; on the last stage.
        exact: by point and micro-batch, the gradient there; at the last block that is e.
        dtype: that of autocast in the last forward; None without it.
    """

    def __init__(self, split: StageModel, places: Places, device: torch.device, points: Sequence[int]) -> None:
        super().__init__()
        self.split, self.places, self.device = split, places, device
        self.loss: Loss | None = None
        self.number: int = 0
        self.extent: Extent = Extent(0, None)
        self.star: bool = False
        self.learning: bool = False
        self.recording: bool = False
        self.cut: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}
        self.y: Tensor | None = None
        self.exact: dict[tuple[int, int], Tensor] = {}
        self.dtype: torch.dtype | None = None
        for index in [*points, max(split.blocks)] if places.is_last else points:
            split.blocks[index].register_forward_hook(Hook(self._behind(index)))

    def forward(self, received: Tensor | None = None) -> Tensor:
        """Run one micro-batch.

        Args:
            received: hidden states from the stage below; None in the first stage.
        """
        assert self.loss is not None
        if self.star and received is not None:
            received = self._read(min(self.split.blocks) - 1, received)
        with self.split.border.holding(received, self.extent, self.device):
            try:
                return self.loss(self.number).reshape(1).to(self.split.loss_dtype)
            except StageEndError as leaving:
                # As the next stage expects it; an evaluation may compute in another type than the training.
                return leaving.h.to(self.split.seen.h[max(self.split.blocks)].dtype).contiguous()

    def _read(self, point: int, h: Tensor) -> Tensor:
        """Return what is read behind a point: a leaf, whose gradient is kept if maps learn from it."""
        learning = self.learning and (point in self.split.blocks or self.split.trained_below)
        leaf = h.detach().requires_grad_(learning)
        if learning:
            self.inputs[point] = leaf
        return leaf

    def _behind(self, index: int) -> Any:
        """Return the hook behind a block with a feedback point, or behind the last block, whose output is y."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple | list) else output
            if not torch.is_grad_enabled():
                return None
            if not self.star:
                return self._record(index, h)
            check_gradient(index, h, module)
            refuse_recomputed(index, h, module)
            if h.requires_grad:
                self.cut[index], self.dtype = h, autocast_dtype(h)
            return _put(output, self._handed_on(index, h))

        return hook

    def _handed_on(self, index: int, h: Tensor) -> Tensor:
        """Return what goes on from a block without its graph: to the next, to the next stage, or as y to the head."""
        if index < max(self.split.blocks):
            return self._read(index, h) if h.requires_grad else h
        if not self.places.is_last:
            return h.detach()
        self.y = h.detach().requires_grad_()
        return self.y

    def _record(self, index: int, h: Tensor) -> None:
        """Note the gradient that arrives at a point in an ordinary backward."""
        if self.recording and h.requires_grad:
            key = index, self.number
            h.register_hook(lambda gradient: self.exact.__setitem__(key, gradient))


def _put(output: Any, h: Tensor) -> Any:
    return type(output)((h, *output[1:])) if isinstance(output, tuple | list) else h


@dataclass
class Waiting:
    """What a micro-batch in a star has left for its backward.

    Attributes:
        cut: by point, the hidden states that the local backward starts from.
        inputs: by point, what the block behind it has read; for maps that learn.
        y: the last block's output; None on all stages but the last.
        e: the error, on the last stage that at y.
        arrived: the error as it travels.
    """

    cut: dict[int, Tensor]
    inputs: dict[int, Tensor]
    y: Tensor | None
    e: Tensor | None = None
    arrived: Tensor | None = None


class FeedbackStage(PipelineStage):
    """A stage that can do both: the backward of a chain, or in a star a local backward from e.

    Args:
        module: what it runs.
        extent: of each micro-batch.
        star: whether this is for a star.
        feedback: B_l of this stage.
    """

    def __init__(self, module: StageModule, extent: Extent, star: bool, feedback: StageFeedback | None) -> None:
        split, places, device = module.split, module.places, module.device

        def like(block: int) -> Tensor:
            shape, dtype = split.shape_after(block, extent), split.seen.h[block].dtype
            return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)

        start, end = split.cuts[split.stage], split.cuts[split.stage + 1]
        loss = torch.empty(1, dtype=split.loss_dtype, device=device, requires_grad=True)
        self.module = module  # what torch calls submod, by its own type
        super().__init__(
            module,
            split.stage,
            split.stages,
            device,
            # Shapes are known, so that torch does not have to find them out by a batch of its own.
            input_args=() if places.is_first else (like(start - 1),),
            output_args=(loss,) if places.is_last else (like(end - 1),),
            group=places.pipe,
        )
        self.extent, self.star, self.feedback, self.places = extent, star, feedback, places
        self._waiting: dict[int, Waiting] = {}

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """F: run a micro-batch through this stage."""
        module = self.module
        module.number, module.extent = fwd_chunk_id, self.extent
        module.star, module.cut, module.inputs, module.y = self.star and self.has_backward, {}, {}, None
        try:
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        except RuntimeError as error:
            # torch puts its own error around each, with all shapes; what went wrong is inside.
            raise (error.__cause__ or error) from None
        if module.star:
            self._waiting[fwd_chunk_id] = Waiting(module.cut, module.inputs, module.y)
        module.star, module.cut, module.inputs, module.y = False, {}, {}, None
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """B, the whole backward; or I in a star: make the error e, or take it."""
        if not self.star or not self.has_backward:
            super().backward_one_chunk(bwd_chunk_id, loss, *args, **kwargs)
            return
        self.fwd_cache.pop(bwd_chunk_id)
        waiting = self._waiting[bwd_chunk_id]
        if self.is_last and waiting.y is None:
            raise RuntimeError(
                "expected the output of the last block to carry a gradient, as some of its weights, or of the "
                f"head's, are to be trained. {REENTRANT}"
            )
        if waiting.y is not None:
            loss.backward()
            assert waiting.y.grad is not None
            assert self.feedback is not None
            waiting.e = waiting.y.grad
            waiting.arrived = self.feedback.spread(waiting.e, bwd_chunk_id)
        else:  # torch's buffer for a gradient from above
            waiting.arrived = waiting.e = self._retrieve_recv_grads(bwd_chunk_id)[0]
        self.bwd_cache[bwd_chunk_id] = (waiting.arrived,)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive a gradient from the stage above; in a star e, from the last stage itself."""
        if not self.star or not self.has_backward or self.is_last:
            return super().get_bwd_recv_ops(bwd_chunk_id)
        buffer = self.grad_recv_info[bwd_chunk_id][0].buffer
        assert buffer is not None
        return [dist.P2POp(dist.irecv, buffer, self.places.last, self.places.pipe)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a gradient to the stage below; in a star e, from the last stage to every other."""
        if not self.star or not self.has_backward:
            return super().get_bwd_send_ops(bwd_chunk_id)
        (e,) = self.bwd_cache.pop(bwd_chunk_id)
        assert e is not None
        below = range(self.places.first, self.places.last) if self.is_last else ()
        return [dist.P2POp(dist.isend, e, rank, self.places.pipe) for rank in below]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """W in a star: the local backward, from delta_l = B_l e at every point of this stage."""
        if not self.star or not self.has_backward:
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            return
        assert self.feedback is not None
        waiting = self._waiting.pop(bwd_chunk_id)
        cut, e, arrived = waiting.cut, waiting.e, waiting.arrived
        assert e is not None
        assert arrived is not None
        deltas = self.feedback.deltas(list(cut), arrived, e, self.module.dtype)
        if cut:  # nothing is trained in a stage without
            torch.autograd.backward(list(cut.values()), list(deltas.values()))
        if waiting.inputs:
            self.feedback.observe(waiting.inputs, deltas, arrived)
