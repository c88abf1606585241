"""The figures of a run: what its evaluations measured, out of the Trainer's log and the files that it saved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

# What stands in a log beside figures: it says nothing about the model.
_NO_FIGURES = ("_runtime", "_per_second", "_preparation_time", "_compilation_time", "epoch", "step", "total_flos")


def read_results(folder: str | Path) -> dict[str, float]:
    """Read the figures of a run's last evaluation from its folder.

    Raises:
        FileNotFoundError: if it holds neither ``all_results.json`` nor ``trainer_state.json``.
    """
    folder = Path(folder)
    state, saved = read_json(folder / "trainer_state.json"), read_json(folder / "all_results.json")
    if not state and not saved:
        raise FileNotFoundError(
            f"{folder}: expected the folder of a run, found neither all_results.json nor trainer_state.json in it."
        )
    return final_results(state.get("log_history", []))[0] | figures(saved)


def final_results(history: list[dict[str, Any]], best: int | None = None) -> tuple[dict[str, float], int | None]:
    """Find the figures of the last evaluation in a log.

    Args:
        history: the Trainer's log.
        best: the step whose weights were put back at the end, if they were. Unless the model was evaluated after that,
            its figures are those of this step.

    Returns:
        The figures, and the step they are of. Several data sets that were evaluated at one step count as one
        evaluation.
    """
    evaluations = [entry for entry in history if any(map(_is_evaluation, entry))]
    ended = next((i for i, entry in reversed(list(enumerate(history))) if "train_runtime" in entry), len(history))
    if best is not None and not any(map(_is_evaluation, (name for entry in history[ended:] for name in entry))):
        evaluations = [entry for entry in evaluations if entry["step"] == best]
    if not evaluations:
        return {}, None
    last = evaluations[-1]["step"]
    merged: dict[str, float] = {}
    for entry in evaluations:
        if entry["step"] == last:
            merged |= figures(entry)
    return merged, last


def best_step(state: TrainerState, args: TrainingArguments) -> int | None:
    """Return the step whose weights ``load_best_model_at_end`` put back, None if it is not set."""
    return getattr(state, "best_global_step", None) if args.load_best_model_at_end else None


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Keep what an evaluation measured; neither times nor what was measured of the training."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and not name.endswith(_NO_FIGURES)
        and not name.startswith(("train_", "before_init_mem", "init_mem"))
        and "_mem_" not in name
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file, empty where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _is_evaluation(name: str) -> bool:
    return name.endswith("_runtime") and name != "train_runtime"
