"""What the recipes share: a check on what was loaded, and what a run leaves behind."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from grape_hf import GrapeTrainer

logger = logging.getLogger("recipes")


def same_on_every_process(name: str) -> None:
    """Refuse to go on if the Hub answered to some processes only: they would train on different data."""
    if len(names := set(gather_object([name]))) > 1:
        raise RuntimeError(f"The processes loaded different data: {', '.join(sorted(names))}. Set --dataset_name.")


def save_metrics(trainer: GrapeTrainer, split: str, metrics: dict[str, Any]) -> None:
    """Print metrics, and save them as ``<split>_results.json`` and in ``all_results.json``."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def write_or_push_card(trainer: GrapeTrainer, card: dict[str, Any]) -> None:
    """Write the card; with ``push_to_hub`` push the output folder, the card in it.

    Args:
        trainer: the Trainer of a run that has left all else in its folder: a push that fails costs nothing then.
        card: arguments of ``create_model_card``.
    """
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def plot_callbacks() -> list[TrainerCallback]:
    """Return what keeps ``curves.png`` and ``alignment.png`` in the output folder current, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("No plots: matplotlib is missing. pip install '.[plot]' in a checkout of grape_hf")
        return []
    from grape_hf.reports.plot_callback import PlotCallback

    return [PlotCallback()]


def write_history(output: Path, history: list[dict[str, Any]]) -> None:
    """Save what was logged of the alignment as ``alignment.json``, and say which pictures ``plot_callbacks`` left.

    Args:
        output: the folder of the run.
        history: the Trainer's log.
    """
    aligned = [
        {k: v for k, v in entry.items() if k == "step" or k.startswith(("grape/alignment/", "grape/calibration/"))}
        for entry in history
        if any(key.startswith("grape/alignment/") for key in entry)
    ]
    (output / "alignment.json").write_text(json.dumps(aligned, indent=1), encoding="utf-8")
    pictures = [output / name for name in ("curves.png", "alignment.png") if (output / name).is_file()]
    print("Wrote", ", ".join(map(str, [output / "alignment.json", *pictures])))
