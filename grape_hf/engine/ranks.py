"""The processes (ranks) that train one model on shares of each batch, and how their feedback stays one and the same.

Every rank holds all of B_1 .. B_{L-1}, whole and unsharded. They are equal bit for bit on all ranks at every step: what
refines them is summed over ranks, and the rest is arithmetic of single numbers and columns, the same everywhere. What
could differ is taken from rank 0: a start or a file that each rank made or read for itself, cosines and the solution
of a linear system, whose last digits depend on the number of threads and on the processor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group of ``torch.distributed``; on its own by default.

    Both methods must be called by all ranks, with tensors of the same shapes and dtypes, and leave their arguments as
    they are.

    Args:
        count: how many there are.
        group: the process group; the default one if None.
    """

    count: int = 1
    group: Any = None

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of each tensor over ranks."""
        return self._together(tensors, lambda joined: dist.all_reduce(joined, group=self.group))

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor as rank 0 has it."""
        return self._together(tensors, lambda joined: dist.broadcast(joined, group=self.group, group_src=0))

    def _together(self, tensors: Sequence[Tensor], act: Callable[[Tensor], object]) -> list[Tensor]:
        """Join tensors of one device and dtype, act on them in one transfer, and part them again."""
        results = list(tensors)
        if self.count == 1:
            return results
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(results):
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
        for indices in groups.values():
            joined = torch.cat([results[i].detach().flatten() for i in indices])
            act(joined)
            parts = joined.split([results[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                # A copy, so that small tensors do not keep the joined one alive.
                results[i] = part.reshape(results[i].shape).clone()
        return results


ALONE = Ranks()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model: each forward then needs all ranks, and must run to its end."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
