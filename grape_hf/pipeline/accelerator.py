"""accelerate's view of a pipeline: R processes that share the data, each of which is K processes.

accelerate knows data parallelism. To it a pipeline is a run of R replicas: loaders share out batches among replicas,
``gather`` collects over the replicas of one stage, and the gradient's norm is that of the whole model.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.trainer_pt_utils import nested_concat

from grape_hf.pipeline.places import Places


def show_replicas(places: Places) -> None:
    """Have accelerate see R processes that nothing wraps; call it before its ``Accelerator`` is made.

    The process keeps its true index, so that one process of all is the main one.
    """
    state = PartialState()
    state.distributed_type, state.num_processes = DistributedType.NO, places.replicas


class PipelineAccelerator(Accelerator):
    """An ``Accelerator`` of one stage; made out of an ordinary one by ``become``.

    Attributes:
        places: of this process.
        counted_elsewhere: parameters that the norm does not count here, since another stage counts them.
    """

    places: Places
    counted_elsewhere: list[nn.Parameter]
    _norm: tuple[Any, Tensor] | None

    @staticmethod
    def become(accelerator: Accelerator, places: Places) -> None:
        """Turn the Trainer's own accelerator, which it makes by itself, into one of a stage."""
        accelerator.__class__ = PipelineAccelerator
        assert isinstance(accelerator, PipelineAccelerator)
        accelerator.places, accelerator.counted_elsewhere, accelerator._norm = places, [], None

    @property
    def num_processes(self) -> int:
        """Count those that share the data."""
        return self.places.replicas

    @property
    def process_index(self) -> int:
        """Say which of them this is."""
        return self.places.replica

    def gather(self, tensor: Any) -> Any:
        """Return the rows that all replicas have, those of the first replica first."""
        if self.places.replicas == 1:
            return tensor
        found: list[Any] = [None] * self.places.replicas
        rows = _map(tensor, lambda t: t[None] if t.ndim == 0 else t)
        for replica in range(self.places.replicas):
            found[replica] = _map(rows, lambda t, r=replica: self._of(t, r))
        joined = found[0]
        for more in found[1:]:
            joined = nested_concat(joined, more)
        return joined

    def _of(self, tensor: Tensor, replica: int) -> Tensor:
        """Return a tensor as one replica has it."""
        sent = tensor.contiguous() if replica == self.places.replica else torch.empty_like(tensor).contiguous()
        source = replica * self.places.stages + self.places.stage
        dist.broadcast(sent, src=source, group=self.places.across)
        return sent

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Bring tensors of all replicas to the length of the longest along ``dim``."""
        if self.places.replicas == 1:
            return tensor

        def pad(t: Tensor) -> Tensor:
            if dim >= t.ndim:
                return t
            longest = torch.tensor([t.shape[dim]], device=t.device)
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.places.across)
            missing = int(longest) - t.shape[dim]
            sides = (missing, 0) if pad_first else (0, missing)
            return F.pad(t, (*[0, 0] * (t.ndim - dim - 1), *sides), value=pad_index)

        return _map(tensor, pad)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum or average over replicas."""

        def total(t: Tensor) -> Tensor:
            t = t.clone()
            dist.all_reduce(t, group=self.places.across)
            return t * scale / (self.places.replicas if reduction == "mean" else 1)

        return tensor if self.places.replicas == 1 else _map(tensor, total)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip by the norm of the whole model's gradient, and return that norm.

        Without a limit the norm is only to be logged. Then nobody waits for the other stages here, which may be at
        work still: ``finish_norm`` does.
        """
        parameters = [p for p in parameters if p.grad is not None]
        elsewhere = {id(p) for p in self.counted_elsewhere}
        gradients = [p.grad for p in parameters if id(p) not in elsewhere]
        total = torch.nn.utils.get_total_norm(gradients) ** 2 if gradients else torch.zeros((), device=self.device)
        total = total.to(torch.float64)  # as all stages have it
        self.finish_norm()
        work = dist.all_reduce(total, group=self.places.pipe, async_op=True)
        self._norm = (work, total)
        if max_norm != float("inf"):
            self.finish_norm()
            dtype = gradients[0].dtype if gradients else torch.float32
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total.to(dtype))
        return total

    def finish_norm(self) -> None:
        """Wait for the last norm, if it is still on its way."""
        if self._norm is not None:
            work, total = self._norm
            work.wait()
            total.sqrt_()
            self._norm = None

    def wait_for_everyone(self) -> None:
        """Wait for all stages of all replicas."""
        self.places.wait()


def _map(value: Any, act: Any) -> Any:
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(item, act) for item in value)
    return {name: _map(item, act) for name, item in value.items()} if isinstance(value, dict) else value
