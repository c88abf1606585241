r"""The maps of blocks over stages: each is learned where its block is, and their product is handed down.

B_l is the product of the maps of all blocks above (``core/block_maps.py``). A stage learns those of its own blocks from
its own backwards. The matrix at its end, which it needs for all others, is the product of all maps above the stage. It
comes from there once in each step in which maps learn. No stage waits for it: it is asked for at the end of the step,
and looked at when the next error has arrived.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.feedback import normalize_columns
from grape_hf.core.finite import FiniteGuard
from grape_hf.engine.ranks import Ranks
from grape_hf.pipeline.places import Places


class StageMaps:
    """The maps that one stage learns.

    Args:
        points: for each map the feedback point that it leads to, by the number of the block before it: the end of the
            stage below, and all points inside this stage.
        end: the last block of this stage. The delta there, or e, is what the last map takes.
        maps: one for each of these points.
        above: the matrix at this stage's end, ``(n, n)``; None in the last stage.
        places: of this process.
        lr: eta_B.
        normalize: whether columns get unit length after each refinement.

    Attributes:
        alignment: how well the maps did in the last step in which they learned, ``(len(points),)``.
        guard: keeps NaN and Inf out.
    """

    def __init__(
        self,
        points: Sequence[int],
        end: int,
        maps: BlockMaps,
        above: Tensor | None,
        places: Places,
        lr: float,
        normalize: bool,
    ) -> None:
        self.points, self.end, self.places = list(points), end, places
        self.lr, self.normalize = lr, normalize
        self.maps, self.above, self.guard = maps, above, FiniteGuard()
        self.alignment: Tensor | None = None
        self._asked: Any = None  # the transfer by which ``above`` is on its way
        self._sent: tuple[Any, Tensor] | None = None
        self._stale = False

    def begin(self, turn: int) -> None:
        """Begin an optimiser step, the turn of ``BlockMaps.begin``."""
        self.maps.begin(turn)

    def observe(self, inputs: Mapping[int, Tensor], deltas: Mapping[int, Tensor]) -> None:
        """Learn from the backward of one micro-batch.

        Args:
            inputs: by point, what the block behind it has read; its ``grad`` is what that block has computed.
            deltas: by point, what it was given; at the last block of the model the error e.
        """
        looked_at = {point: self.maps.sampled(delta) for point, delta in deltas.items()}
        for index, (point, behind) in enumerate(pairwise([*self.points, self.end])):
            if point in inputs and behind in looked_at:
                v, d = inputs[point].grad, looked_at[behind]
                assert v is not None
                predicted = looked_at[point] if point in looked_at else self.maps.apply(index, d)
                self.maps.observe(index, self.maps.sampled(v), d, predicted)
        self.maps.gather()

    def refine(self) -> None:
        """Learn from the sums of one optimiser step over all replicas, and ask for the matrix at this stage's end."""
        if self.points:
            sums = self.maps.total(Ranks(self.places.replicas, self.places.across).total)
            self.alignment = self.maps.alignment(sums)
            refined = self.maps.refined(sums, self.lr)
            if self.normalize:
                refined = [normalize_columns(g) for g in refined]
            self.maps.G = self.guard.admit(self.maps.G, refined)
        self._stale = True
        if self.above is None:
            return
        self.above = torch.empty_like(self.above)
        self._asked = dist.irecv(self.above, self.places.rank + 1, group=self.places.down)

    def settle(self) -> dict[int, Tensor]:
        """Return the matrices by point where they are new, and hand the lowest down; to be called by all stages."""
        if not self._stale:
            return {}
        self._stale = False
        if self._asked is not None:
            self._asked.wait()
            self._asked = None
        found = dict(zip(self.points, self.maps.product(self.above), strict=True))
        if not self.places.is_first:
            if self._sent is not None:
                self._sent[0].wait()
            lowest = found[self.points[0]].contiguous()
            self._sent = dist.isend(lowest, self.places.rank - 1, group=self.places.down), lowest
        return found if self.above is None else found | {self.end: self.above}
