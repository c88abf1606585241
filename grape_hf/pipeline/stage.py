"""What one stage does with one micro-batch: forward, backward, or the two parts of a star's backward.

``FeedbackStage`` is torch's ``PipelineStage`` for a ``StageModel``. Its forward runs the Trainer's own loss on a
micro-batch; on all stages but the last that ends where the next stage begins. In a star the graph is cut at the stage's
feedback points: the end of every stage, and, with one point a block, behind each of its blocks. A cut hands on a
detached copy and keeps the original, from which the local backward starts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from grape_hf.core.broadcast import check_gradient, refuse_recomputed
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
        for index in points:
            split.blocks[index].register_forward_hook(self._at_point(index))
        if places.is_last:
            split.blocks[max(split.blocks)].register_forward_hook(self._at_y(max(split.blocks)))

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

    def _at_point(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple | list) else output
            if not torch.is_grad_enabled():
                return None
            if not self.star:
                return self._record(index, h)
            check_gradient(index, h, module)
            refuse_recomputed(index, h, module)
            if not h.requires_grad:
                return None
            self.cut[index] = h
            at_end = index == max(self.split.blocks)
            return _put(output, h.detach() if at_end else self._read(index, h))

        return hook

    def _at_y(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple | list) else output
            if not torch.is_grad_enabled():
                return None
            if not self.star:
                return self._record(index, h)
            check_gradient(index, h, module)
            refuse_recomputed(index, h, module)
            if h.requires_grad:
                self.cut[index] = h
            self.y = h.detach().requires_grad_()
            return _put(output, self.y)

        return hook

    def _record(self, index: int, h: Tensor) -> None:
        """Note the gradient that arrives at a point in an ordinary backward."""
        if self.recording and h.requires_grad:
            key = index, self.number
            h.register_hook(lambda gradient: self.exact.__setitem__(key, gradient))


def _put(output: Any, h: Tensor) -> Any:
    return type(output)((h, *output[1:])) if isinstance(output, tuple | list) else h


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
        # By micro-batch: what was cut, what blocks read, and y or e.
        self._waiting: dict[int, tuple[dict[int, Tensor], dict[int, Tensor], Tensor]] = {}

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
            self._waiting[fwd_chunk_id] = (module.cut, module.inputs, output if module.y is None else module.y)
        module.star, module.cut, module.inputs, module.y = False, {}, {}, None
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """B, the whole backward; or I in a star: make the error e, or take it."""
        if not self.star or not self.has_backward:
            super().backward_one_chunk(bwd_chunk_id, loss, *args, **kwargs)
            return
        self.fwd_cache.pop(bwd_chunk_id)
        cut, inputs, y = self._waiting[bwd_chunk_id]
        if self.is_last:
            loss.backward()
            e = y.grad
            assert e is not None
            assert self.feedback is not None
            travelling = self.feedback.spread(e, bwd_chunk_id)
        else:
            travelling = e = self._retrieve_recv_grads(bwd_chunk_id)[0]  # torch's buffer for a gradient from above
        self._waiting[bwd_chunk_id] = (cut, inputs, e)
        self.bwd_cache[bwd_chunk_id] = (travelling,)

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
        cut, inputs, e = self._waiting.pop(bwd_chunk_id)
        deltas = self.feedback.deltas(list(cut), e, bwd_chunk_id)
        if cut:  # nothing is trained in a stage without
            torch.autograd.backward(list(cut.values()), list(deltas.values()))
        if inputs:
            self.feedback.observe(inputs, deltas, e, bwd_chunk_id)
