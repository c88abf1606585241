"""A guard that gives up feedback which has drifted away.

It watches the alignment, a cosine for each boundary, and says which boundaries are to be cut no longer, so that the
exact gradient of the following block flows through them.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from grape_hf.engine.calibration import smooth

logger = logging.getLogger(__name__)

Fallback = Literal["no", "block", "bp"]


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
