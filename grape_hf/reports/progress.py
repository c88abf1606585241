"""What is shown of a run: which settings it took, then loss, alignment and share of backpropagation as it goes on.

The settings are one line at the start, where ``grape_preset="auto"`` has chosen them. The figures stand on the
Trainer's progress bar, and in its table in notebooks. The Trainer's own callback makes the bar or the table, and prints
whatever is logged; with ``disable_tqdm`` there is neither, and no figures are shown here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from grape_hf.presets import BASELINES
from grape_hf.reports.log_names import PRESET, log_names
from grape_hf.training_args import GrapeArgumentsMixin, options_of, resolved

# What is shown of the log, and what it is called on the bar and in the table. The estimate is made more often.
_ALIGNMENT = ("grape/alignment/estimate/mean", "grape/alignment/exact/mean")
_SHARE = "grape/calibration/share"


class ProgressFigures(TrainerCallback):
    """Add to what the Trainer's own progress callback shows.

    Args:
        trainer: it has GrAPE's options with the values for the model, and callbacks, of which this one stands behind
            the one that it adds to.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._callbacks = trainer, trainer.callback_handler.callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which settings ``auto`` has chosen, and note the preset in the log, where a model card finds it later.

        Beside its name stand the options that have another value than the preset's for this model.
        """
        given, options = options_of(args), self._trainer.grape_options
        if given.method in ("bp", *BASELINES):
            return
        of_preset = vars(resolved(replace(given, grape_preset=options.grape_preset)))
        fitted = {name: value for name, value in vars(options).items() if value != of_preset[name]}
        auto, resumed = given.grape_preset == "auto", any(PRESET in entry for entry in state.log_history)
        if (auto or fitted) and not resumed:
            state.log_history.insert(0, {PRESET: options.grape_preset, **log_names(fitted), "step": 0})
        if auto and state.is_world_process_zero:
            self._show(f"GrAPE: {chosen_preset(options)}")

    def _show(self, line: str) -> None:
        for callback in self._callbacks:
            bar = getattr(callback, "training_bar", None)
            if isinstance(callback, ProgressCallback) and bar is not None:
                bar.write(line)
            elif isinstance(callback, PrinterCallback) or getattr(callback, "training_tracker", None) is not None:
                print(line)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the last figures beside the bar, or in a notebook in the row that was just written."""
        logs = state.log_history[-1] if state.log_history else {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        for callback in self._callbacks:
            bar = getattr(callback, "training_bar", None)
            if isinstance(callback, ProgressCallback) and bar is not None:
                bar.set_postfix_str(
                    ", ".join([f"loss {logs['loss']:.4g}", *(f"{k} {v}" for k, v in figures(logs).items())])
                )
        if args.eval_strategy == IntervalStrategy.NO:  # else the last row is of an evaluation before this entry
            self._add_to_row(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where there are evaluations, a notebook's table has a row for each of them and for nothing else."""
        self._add_to_row(state)

    def _add_to_row(self, state: TrainerState) -> None:
        shown = {name[0].upper() + name[1:]: text for name, text in figures(last_logs(state)).items()}
        for callback in self._callbacks:
            tracker: Any = getattr(callback, "training_tracker", None)  # not by class: that would import IPython
            rows = getattr(tracker, "inner_table", None) or []
            if len(rows) < 2 or not shown:
                continue
            columns, *_, last = rows
            columns.extend(name for name in shown if name not in columns)
            for row in rows[1:]:
                row.extend(["No log"] * (len(columns) - len(row)))
            for name, text in shown.items():
                last[columns.index(name)] = text
            tracker.display()


def chosen_preset(options: GrapeArgumentsMixin) -> str:
    """Say which settings ``grape_preset="auto"`` has chosen, and why, in one line.

    Args:
        options: GrAPE's options for the model.
    """
    found = {
        "convnet": "convolutions in the blocks",
        "resnet": "convolutions and shortcut connections in the blocks",
    }.get(options.grape_preset, "no convolutions in the blocks")
    return f'grape_preset="{options.grape_preset}", as there are {found}.'


def figures(logs: Mapping[str, Any]) -> dict[str, str]:
    """Return the mean alignment and the share of backpropagation steps of a log entry, as far as it has them."""
    found = {"alignment": next((f"{logs[name]:.3f}" for name in _ALIGNMENT if name in logs), None)}
    found["BP share"] = f"{100 * logs[_SHARE]:.3g} %" if _SHARE in logs else None
    return {name: text for name, text in found.items() if text is not None}


def last_logs(state: TrainerState) -> Mapping[str, Any]:
    """Return the last log entry of the training; evaluations have entries of their own."""
    return next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
