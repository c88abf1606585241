"""What is measured of the feedback in a step, and the figures that are logged of it.

Sums over micro-batches are kept until the step ends, then summed over ranks and turned into cosines, which the adaptive
schedule and the drift guard watch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grape_hf.core.alignment import (
    add_pairs,
    delta_alignment,
    delta_products,
    pair_products,
    replayed_alignment,
    size_ratio,
)
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import Feedback
from grape_hf.core.modes import Forward
from grape_hf.core.refit import refit_moments
from grape_hf.engine.aside import Aside
from grape_hf.engine.calibration import CalibrationSchedule
from grape_hf.engine.drift import DriftGuard
from grape_hf.engine.ranks import Ranks
from grape_hf.training_args import GrapeArgumentsMixin

FRESH = ("alignment/exact", "weight_gradient")  # logged once, when they were measured


class WeightGradients:
    """Gradients of weights by a star beside the exact ones, summed over micro-batches."""

    def __init__(self) -> None:
        self._pairs: list[list[tuple[Tensor, Tensor]]] = []

    def add(self, pairs: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Add pairs (g, g'), for each boundary those of the block before it."""
        earlier = self._pairs or [[] for _ in pairs]
        self._pairs = [add_pairs(a, b) for a, b in zip(earlier, pairs, strict=True)]

    def figures(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return cosine and size ratio of each boundary by name, over ranks, and forget the sums; none of nothing."""
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return {}
        totals = iter(ranks.total([t for of_block in pairs for pair in of_block for t in pair]))
        products = pair_products([[(next(totals), next(totals)) for _ in of_block] for of_block in pairs])
        return {"weight_gradient/cosine": delta_alignment(products), "weight_gradient/size": size_ratio(products)}


class Measures:
    """The measurements of one run.

    Args:
        options: GrAPE's options.
        ranks: the processes that train the model.

    Attributes:
        metrics: the figures, on their devices; none before the run has started.
    """

    def __init__(self, options: GrapeArgumentsMixin, ranks: Ranks) -> None:
        self.options, self.ranks = options, ranks
        self.metrics: dict[str, Tensor | float] = {}

    def start(self, schedule: CalibrationSchedule, drift: DriftGuard) -> None:
        """Name those who watch the alignment: the schedule of calibrations, and the guard that gives up feedback."""
        self.schedule, self.drift = schedule, drift

    def begin(self) -> None:
        """Begin an optimiser step."""
        self._products: Tensor | None = None
        self._of_weights = WeightGradients()
        self._moments: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def note_chain(self, forwards: Sequence[Forward], feedback: Feedback) -> None:
        """Note what an ordinary backward, that of a calibration step, has shown.

        It tells how good B_l e is, and nothing of what paths and sweeps make of it.
        """
        if self.options.feedback_path == "matrix" and not self.options.feedback_sweeps:
            self._add(delta_products(forwards, feedback.B))
        if self.options.calibration_refit and forwards:
            found = refit_moments(forwards, len(feedback.B), feedback.B)
            earlier = self._moments or [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in found]
            self._moments = [(a + c, b + d) for (a, b), (c, d) in zip(earlier, found, strict=True)]

    def replay(self, boundaries: Boundaries, aside: Aside, forwards: Sequence[Forward], feedback: Feedback) -> None:
        """Measure what a star has sent, by calling the model once more for each call of the step, without its loss.

        Args:
            boundaries: attached to the model.
            aside: calls the model on the side.
            forwards: of the star, after the backward, with e and what was sent.
            feedback: the matrices.
        """
        for call in {id(forward.call): forward.call for forward in forwards if forward.call is not None}.values():
            of_call = [forward for forward in forwards if forward.call is call]
            weights = not aside.sharded  # of shards there is no whole gradient
            with aside.entered(deterministic=False):
                call.same_randomness()
                products, of_weights = replayed_alignment(boundaries, call, of_call, feedback.B, weights)
            self._add(products)
            if weights:
                self._of_weights.add(of_weights)

    def finish(self, step: int, feedback: Feedback) -> None:
        """Turn the sums of the step into figures, and fit B_l where that is due."""
        if self._products is not None:
            self.note_alignment("exact", delta_alignment(*self.ranks.total([self._products])), step)
        for name, values in self._of_weights.figures(self.ranks).items():
            self.metrics[f"{name}/mean"] = values.nanmean()
            self.metrics |= {f"{name}/h_{i}": value for i, value in enumerate(values, 1)}
        if self._moments:
            totals = iter(self.ranks.total([t for pair in self._moments for t in pair]))
            feedback.refit(list(zip(totals, totals, strict=True)))
            feedback.put(self.ranks.first(feedback.B))

    def note_alignment(self, kind: str, cosines: Tensor, step: int) -> None:
        """Log the cosines of all boundaries, and have the schedule and the guard see them.

        Args:
            kind: "estimate", with J_hat_l or by what the maps have predicted, or "exact", with delta_l.
            cosines: ``(L-1,)``.
            step: the optimiser step.
        """
        (cosines,) = self.ranks.first([cosines])  # all ranks calibrate at the same steps
        mean = cosines.nanmean()  # NaN at a boundary before which nothing is trained
        # The adaptive schedule and the guard watch one of the two: the exact one where it is measured regularly.
        if kind == ("exact" if self.options.alignment_steps else "estimate"):
            self.schedule.observe(mean)
            self.drift.observe(step, cosines)
        self.metrics[f"alignment/{kind}/mean"] = mean
        self.metrics |= {f"alignment/{kind}/h_{i}": c for i, c in enumerate(cosines, 1)}

    def note_schedule(self, step: int, calibrating: bool) -> None:
        """Log how many steps were calibrations, and how many boundaries were given up."""
        if calibrating:
            self.schedule.taken(step)
            self.metrics["calibration/last_step"] = step + 1
        self.metrics["calibration/steps"] = self.schedule.count
        self.metrics["calibration/share"] = self.schedule.count / (step + 1)
        if self.drift.mode != "no":
            self.metrics["fallback/blocks"] = self.drift.uncut

    def read(self, feedback: Feedback) -> dict[str, float]:
        """Return what there is to log, with a single transfer from the device.

        The alignment with the estimate is the last one made; the exact alignment is there if it was measured since the
        last call.

        Raises:
            FloatingPointError: if too many refinements in a row were skipped (``max_skipped_refinements``).
        """
        metrics = self.metrics | feedback.guard.metrics()
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        values = torch.stack([t.float() for t in tensors.values()]).tolist() if tensors else []
        read = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
        self.metrics = {name: value for name, value in self.metrics.items() if not name.startswith(FRESH)}
        read |= dict(zip(tensors, values, strict=True))
        feedback.guard.check(read)
        return read

    def _add(self, products: Tensor) -> None:
        self._products = products if self._products is None else self._products + products
