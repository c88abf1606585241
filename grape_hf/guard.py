"""Two guards over the feedback matrices: nothing that is not finite gets in, and feedback that drifted away is left.

``FiniteGuard`` decides on the device, with no word to the host, whether a refinement of B_l is taken; it keeps count.
``DriftGuard`` watches the alignment, a cosine for each boundary, and says which boundaries are to be cut no longer, so
that the exact gradient of the following block flows through them.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grape_hf.calibration import smooth

logger = logging.getLogger(__name__)

Fallback = Literal["no", "block", "bp"]


class FiniteGuard:
    """Take a refinement of the feedback where all of it is finite, else keep what there was, and count that.

    NaN or Inf in e, in J_hat or in B_l all end up in the refined matrices, so these are what is looked at. All
    boundaries share one decision, the same on every rank: they share one q or e. The count is a tensor on the device;
    ``check`` is for whoever reads it, at a logging step.

    Args:
        limit: ``check`` raises after so many skipped refinements in a row; 0: never.

    Attributes:
        counts: skipped refinements, ``(3,)``: all, in a row up to now, and the most in a row; None before the first
            refinement.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.counts: Tensor | None = None
        self._warned = False

    def admit(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        """Return ``new`` if every number in it is finite, else ``old``; matrices of equal shapes, one for one."""
        device = old[0].device
        finite = torch.stack([torch.isfinite(b).all().to(device) for b in new]).all()
        if self.counts is None:
            self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        total, row, most = self.counts
        row = torch.where(finite, 0, row + 1)
        self.counts = torch.stack([total + ~finite, row, torch.maximum(most, row)])
        return [torch.where(finite.to(b.device), b, a) for a, b in zip(old, new, strict=True)]

    def metrics(self) -> dict[str, Tensor]:
        """Return what is to be logged, on the device; nothing before the first refinement."""
        if self.counts is None:
            return {}
        return {"feedback/skipped": self.counts[0], "feedback/skipped_in_a_row": self.counts[2]}

    def check(self, read: dict[str, float]) -> None:
        """Warn, once, if refinements were skipped.

        Args:
            read: ``metrics``, read from the device.

        Raises:
            FloatingPointError: if ``limit`` in a row were.
        """
        total, most = (int(read.get(name, 0)) for name in ("feedback/skipped", "feedback/skipped_in_a_row"))
        if total and not self._warned:
            self._warned = True
            logger.warning(
                f"GrAPE: NaN or Inf in the error or in the estimated Jacobian: {total} refinement(s) of the feedback "
                "skipped so far (grape/feedback/skipped in the logs). B_l stays as it was."
            )
        if self.limit and most >= self.limit:
            raise FloatingPointError(
                f"{most} refinements of the feedback in a row met NaN or Inf, and max_skipped_refinements="
                f"{self.limit}: the feedback has stopped learning. If the loss is NaN too, the weights have diverged: "
                "resume from an earlier checkpoint with a lower learning_rate. Else the forward without dropout "
                'overflows: use bf16 in place of fp16, or jvp_mode="finite_difference". '
                "max_skipped_refinements=0 goes on regardless."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know; ``counts`` stays on the device."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the counts of an earlier run; the most in a row starts anew, as whoever resumes may have acted."""
        if state["counts"] is not None:
            total, row, _ = state["counts"]
            self.counts = torch.tensor([total, row, 0], dtype=torch.int64, device=device)


class DriftGuard:
    """Give up the feedback, at one boundary or at all, where its alignment stays below a threshold.

    - ``no``: never.
    - ``block``: each boundary by its own alignment.
    - ``bp``: all of them, by the mean alignment; every step is ordinary backpropagation from then on.

    A measurement is smoothed with those before it. It is for good: a boundary that was given up is not cut again.

    Args:
        mode: one of the above.
        threshold: the cosine.
        patience: how many measurements in a row the smoothed alignment must be below it.
        names: of the blocks that end at the boundaries, in order.
    """

    def __init__(self, mode: Fallback, threshold: float, patience: int, names: Sequence[str]) -> None:
        self.mode, self.threshold, self.patience, self.names = mode, threshold, patience, list(names)
        watched = {"no": 0, "block": len(self.names), "bp": 1}[mode]
        self.smoothed: list[float | None] = [None] * watched
        self.below = [0] * watched
        self.given_up = [False] * watched

    def observe(self, step: int, alignment: Tensor) -> None:
        """Take in the alignment of each boundary, ``(L-1,)``; NaN says nothing. Reads the tensor if not ``no``."""
        if self.mode == "no":
            return
        values = alignment.tolist() if self.mode == "block" else [float(alignment.nanmean())]
        for i, value in enumerate(values):
            if self.given_up[i] or not math.isfinite(value):
                continue
            smoothed = self.smoothed[i] = smooth(self.smoothed[i], value)
            self.below[i] = self.below[i] + 1 if smoothed < self.threshold else 0
            if self.below[i] >= self.patience:
                self.given_up[i] = True
                self._announce(step, i, smoothed)

    def cuts(self, index: int) -> bool:
        """Whether the boundary still gets direct feedback."""
        return not self.given_up or not self.given_up[0 if self.mode == "bp" else index]

    @property
    def uncut(self) -> int:
        """The number of boundaries that were given up."""
        return sum(not self.cuts(i) for i in range(len(self.names)))

    @property
    def everywhere(self) -> bool:
        """Whether no boundary is left, and every step is ordinary backpropagation."""
        return self.uncut == len(self.names) > 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {
            "mode": self.mode,
            "smoothed": list(self.smoothed),
            "below": list(self.below),
            "given_up": list(self.given_up),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run; with another ``mode`` this one starts afresh."""
        if state["mode"] == self.mode:
            self.smoothed, self.below = list(state["smoothed"]), list(state["below"])
            self.given_up = list(state["given_up"])

    def _announce(self, step: int, i: int, smoothed: float) -> None:
        if self.mode == "bp":
            what = "every step is ordinary backpropagation"
        else:
            what = f"{self.names[i]} gets its gradient from the block after it"
        where = "the mean alignment" if self.mode == "bp" else f"the alignment at h_{i + 1}"
        logger.warning(
            f"GrAPE: falling back at step {step + 1}: {where}, smoothed {smoothed:.3f}, stayed below "
            f"fallback_threshold={self.threshold} for {self.patience} measurement(s); {what} from here on."
        )
