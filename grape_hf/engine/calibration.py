"""Decide which optimiser steps are calibration steps: one mini-batch of ordinary backpropagation for all weights.

The random choices are a function of (seed, window), so the schedule of a resumed run needs no state; only the
adaptive strategy remembers something, the smoothed alignment and when it last calibrated.
"""

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from torch import Tensor

from grape_hf.training_args import GrapeArgumentsMixin

CalibrationStrategy = Literal["no", "epoch", "steps", "adaptive"]

# Weight of the past in the smoothed alignment: single estimates are noisy.
_SMOOTHING = 0.9


def smooth(past: float | None, value: float) -> float:
    """Return the moving average of an alignment after one more measurement; ``past`` is None before the first."""
    return _SMOOTHING * (value if past is None else past) + (1 - _SMOOTHING) * value


class CalibrationSchedule:
    """Answer, once per optimiser step, whether it is a calibration step.

    - ``no``: never.
    - ``epoch``: one step in each window of ``interval`` epochs (T, also a fraction), at a seeded random place in it.
    - ``steps``: every ``interval`` optimiser steps; the first is number ``interval``.
    - ``adaptive``: when the smoothed alignment has fallen below ``threshold``, but not sooner than ``cooldown`` steps
      after the last time.

    Args:
        strategy: one of the above.
        interval: T in epochs, or steps.
        threshold: cosine below which the adaptive strategy calibrates.
        cooldown: least number of steps between two adaptive calibrations.
        seed: the run's seed.
        steps_per_epoch: optimiser steps in an epoch, None where unknown.

    Raises:
        ValueError: if the strategy is ``epoch`` and the length of an epoch is unknown, or shorter than one step in T.
    """

    def __init__(
        self,
        strategy: CalibrationStrategy = "no",
        interval: float = 1.0,
        threshold: float = 0.0,
        cooldown: int = 100,
        seed: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.strategy, self.interval, self.threshold = strategy, interval, threshold
        self.cooldown, self.seed = cooldown, seed
        self.smoothed: float | None = None
        self.last_step: int | None = None
        self.count = 0
        if strategy == "epoch":
            if steps_per_epoch is None:
                raise ValueError(
                    'calibration_strategy="epoch" needs the length of an epoch, and the training data has none '
                    '(a streaming data set). Use calibration_strategy="steps" with calibration_interval in steps.'
                )
            # Exact arithmetic: 0.1 * 30 steps must be 3 steps.
            self._window = Fraction(str(interval)) * steps_per_epoch
            if self._window < 1:
                raise ValueError(
                    f"calibration_interval={interval} epochs is less than one optimiser step: an epoch has "
                    f'{steps_per_epoch}. Use at least {1 / steps_per_epoch:.3g}, or method="bp".'
                )

    def due(self, step: int) -> bool:
        """Return whether optimiser step ``step`` (counted from 0) is a calibration step. Asking changes nothing."""
        if self.strategy == "epoch":
            window = math.ceil((step + 1) / self._window) - 1
            first, end = math.floor(window * self._window), math.floor((window + 1) * self._window)
            return step == np.random.default_rng((self.seed, window)).integers(first, end)
        if self.strategy == "steps":
            return (step + 1) % int(self.interval) == 0
        if self.strategy == "adaptive":
            rested = self.last_step is None or step - self.last_step >= self.cooldown
            return rested and self.smoothed is not None and self.smoothed < self.threshold
        return False

    def observe(self, alignment: Tensor) -> None:
        """Take in the mean alignment of a step. Reads the tensor, a host-device sync, in the adaptive strategy only."""
        if self.strategy == "adaptive" and math.isfinite(value := float(alignment)):
            self.smoothed = smooth(self.smoothed, value)

    def taken(self, step: int) -> None:
        """Remember that ``step`` was a calibration step."""
        self.last_step, self.count = step, self.count + (step != self.last_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return {"smoothed": self.smoothed, "last_step": self.last_step, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run."""
        self.smoothed, self.last_step, self.count = state["smoothed"], state["last_step"], state["count"]


def calibration_schedule(options: GrapeArgumentsMixin, seed: int, steps_per_epoch: int | None) -> CalibrationSchedule:
    """Make the schedule that the options ask for; see ``CalibrationSchedule`` for what is refused."""
    return CalibrationSchedule(
        "no" if options.method == "bp" else options.calibration_strategy or "no",
        options.calibration_interval or 1.0,
        options.calibration_threshold,
        options.calibration_cooldown,
        seed,
        steps_per_epoch,
    )
