"""What the recipes share: options of a mapping, a check on what was loaded, and what a run leaves behind."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import gather_object

from grape_hf import GrapeTrainer

logger = logging.getLogger("recipes")


def parse_overrides(option: str, overrides: str | dict[str, Any] | None) -> dict[str, Any]:
    """Read ``name=value,name=value``, values as in YAML; a mapping from a YAML file is taken as it is.

    Args:
        option: its name, for the message.
        overrides: its value.

    Raises:
        ValueError: for words without a value.
    """
    if not isinstance(overrides, str):
        return dict(overrides or {})
    pairs = [pair.partition("=") for pair in overrides.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"{option}={overrides!r}: expected name=value,name=value.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


def same_on_every_process(name: str) -> None:
    """Refuse to go on if the Hub answered to some processes only: they would train on different data."""
    if len(names := set(gather_object([name]))) > 1:
        raise RuntimeError(f"The processes loaded different data: {', '.join(sorted(names))}. Set --dataset_name.")


def save_metrics(trainer: GrapeTrainer, split: str, metrics: dict[str, Any]) -> None:
    """Print metrics, and save them as ``<split>_results.json`` and in ``all_results.json``."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def write_history(output: Path, history: list[dict[str, Any]], method: str, curves: str, values: Sequence[str]) -> None:
    """Save what was logged of the alignment as data, and it and the curves as pictures if matplotlib is there.

    Args:
        output: the folder of the run.
        history: the Trainer's log.
        method: the run's, for the legend.
        curves: name of the picture of ``values``.
        values: what is drawn of those that were logged.
    """
    aligned = [
        {
            key: value
            for key, value in entry.items()
            if key == "step" or key.startswith(("grape/alignment/", "grape/calibration/"))
        }
        for entry in history
        if any(key.startswith("grape/alignment/") for key in entry)
    ]
    (output / "alignment.json").write_text(json.dumps(aligned, indent=1), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("No plots: matplotlib is missing. pip install 'grape_hf[plot]'")
        return
    from grape_hf.plots import plot_alignment, plot_curves

    logged = [value for value in values if any(value in entry for entry in history)]
    pictures = [plot_curves({method: history}, output / curves, logged)] if logged else []
    if any(key.startswith("grape/alignment/estimate/") for entry in aligned for key in entry):
        pictures.append(plot_alignment(history, output / "alignment.png"))
    print("Wrote", ", ".join(map(str, [output / "alignment.json", *pictures])))
