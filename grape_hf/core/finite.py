"""A guard over the feedback matrices: nothing that is not finite gets in.

It decides on the device, with no word to the host, whether a refinement of B_l is taken, and keeps count.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


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
        # A sum is not finite if one of its numbers is not, and takes a kernel a matrix. (Nor is it if all are huge.)
        finite = torch.stack([b.sum().to(device) for b in new]).isfinite().all()
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
