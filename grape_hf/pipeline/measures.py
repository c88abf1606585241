"""How well the feedback of all stages is aligned: figures of a log, put together from what each stage has measured.

As in one process (``engine/measures.py``): cos(B_l e, delta_l) by the ordinary backwards of calibration steps, and of
``alignment_steps``, which compare the gradients of weights too; and the cosine of what a map predicts with what its
block has computed, in every step in which maps learn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grape_hf.core.alignment import delta_alignment
from grape_hf.core.finite import FiniteGuard
from grape_hf.engine.measures import FRESH, WeightGradients
from grape_hf.engine.ranks import Ranks
from grape_hf.pipeline.feedback import StageFeedback
from grape_hf.pipeline.look import Extent
from grape_hf.pipeline.places import Places
from grape_hf.pipeline.replay import Replay
from grape_hf.pipeline.split import StageModel
from grape_hf.training_args import GrapeArgumentsMixin


class StageMeasures:
    """What one stage measures.

    Args:
        places: of this process.
        split: this stage of the model.
        feedback: of this stage.
        options: GrAPE's.
    """

    def __init__(
        self, places: Places, split: StageModel, feedback: StageFeedback, options: GrapeArgumentsMixin
    ) -> None:
        self.places, self.split, self.feedback = places, split, feedback
        self._guard = FiniteGuard(options.max_skipped_refinements)  # only to say what was skipped
        self._products: Tensor | None = None  # of the step under way
        self._weights = WeightGradients()
        self._fresh: dict[str, Tensor] = {}  # figures of this stage's points that were not logged yet

    @torch.no_grad()
    def note_chain(self, exact: Mapping[tuple[int, int], Tensor], extent: Extent, number: int) -> None:
        """Note what the ordinary backwards of a batch have shown; by all stages, as e is sent to all of them.

        Args:
            exact: by point and micro-batch, the gradient there; at the last block of the model that is e.
            extent: of each micro-batch.
            number: of micro-batches.
        """
        seen, last = self.split.seen, len(self.split.seen.h) - 1
        for m in range(number):
            if self.places.is_last:
                e = self.feedback.spread(exact[last, m], m).contiguous()
            else:
                e = torch.empty(
                    self.split.shape_after(last, extent), dtype=seen.h[last].dtype, device=self.feedback.device
                )
            dist.broadcast(e, src=self.places.last, group=self.places.pipe)
            own = {point: delta for (point, of), delta in exact.items() if of == m}
            found = self.feedback.products(e, own)
            self._products = found if self._products is None else self._products + found

    def note_weights(self, replay: Replay) -> None:
        """Note the gradients of weights before each point of this stage: by the star, and exactly."""
        pairs = []
        for point in self.feedback.own:
            trained = [p for p in self.split.blocks[point].parameters() if p.requires_grad]
            zeros = [torch.zeros_like(p) for p in trained]
            pairs.append([(replay.star.get(p, z), replay.exact.get(p, z)) for p, z in zip(trained, zeros, strict=True)])
        self._weights.add(pairs)

    def finish(self) -> None:
        """Turn the sums of an optimiser step, over replicas, into figures."""
        ranks = Ranks(self.places.replicas, self.places.across)
        if self._products is not None:
            self._fresh["alignment/exact"] = delta_alignment(*ranks.total([self._products]))
            self._products = None
        self._fresh |= self._weights.figures(ranks)

    def share(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return figures with the alignments of all stages among them; by all, on the host.

        Args:
            metrics: the figures of the last log; an exact alignment among them is not repeated.

        Raises:
            FloatingPointError: if too many refinements in a row were skipped (``max_skipped_refinements``).
        """
        maps, points = self.feedback.maps, list(self.feedback.names)
        mine: dict[str, Any] = {kind: _by_point(self.feedback.own, values) for kind, values in self._fresh.items()}
        if maps is not None:
            mine["alignment/estimate"] = _by_point(maps.points, maps.alignment)
            mine["skipped"] = {name: float(value) for name, value in maps.guard.metrics().items()}
        of_stages, self._fresh = self.places.together(mine), {}
        shared = {name: value for name, value in metrics.items() if not name.startswith(FRESH)}
        for kind in ("alignment/exact", "weight_gradient/cosine", "weight_gradient/size", "alignment/estimate"):
            found = {point: value for stage in of_stages for point, value in stage.get(kind, {}).items()}
            if found:
                values = [found[point] for point in points]
                shared[f"{kind}/mean"] = float(torch.tensor(values).nanmean())
                shared |= {f"{kind}/h_{i}": value for i, value in enumerate(values, 1)}
        for skipped in (stage.get("skipped", {}) for stage in of_stages):
            shared |= {name: max(value, shared.get(name, 0.0)) for name, value in skipped.items()}
        self._guard.check(shared)
        return shared


def _by_point(points: Sequence[int], values: Tensor | None) -> dict[int, float]:
    """Return numbers by their points; none if there are none."""
    return {} if values is None else dict(zip(points, values.tolist(), strict=True))
