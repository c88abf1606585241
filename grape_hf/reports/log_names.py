"""The names under which GrAPE's figures are logged: all begin with ``grape/``.

A tracker that shows many scalars then has them in one place: ``train/grape/alignment/...`` in TensorBoard and wherever
else transformers puts ``train/`` first.
"""

from collections.abc import Mapping
from typing import Any

PREFIX = "grape/"
# The preset, also if ``auto`` has chosen it: no figure, and in ``trainer_state.json`` alone.
PRESET = "grape/preset"


def log_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Put the prefix before the names of what a run measured of itself."""
    return {PREFIX + name: value for name, value in metrics.items()}
