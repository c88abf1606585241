"""The names under which GrAPE's figures are logged: all begin with ``grape/``.

A tracker that shows many scalars then has them in one place: ``train/grape/alignment/...`` in TensorBoard and wherever
else transformers puts ``train/`` first. Records of runs made before the prefix was introduced keep the names that they
were written with, and are read by way of ``current_names``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "grape/"
_GROUPS = ("alignment/", "calibration/", "feedback/", "fallback/")


def log_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Put the prefix before the names of what a run measured of itself."""
    return {PREFIX + name: value for name, value in metrics.items()}


def current_names(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a log with the names of today, whenever it was written."""
    return [
        {PREFIX + name if name.startswith(_GROUPS) else name: value for name, value in entry.items()}
        for entry in history
    ]
