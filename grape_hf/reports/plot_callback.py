"""Pictures of a run that keep up with it: ``Trainer(..., callbacks=[PlotCallback()])``, with a stock Trainer too.

Needs the extra ``plot`` (matplotlib). ``plot_training`` draws the same from a log history, so that the pictures of a
finished run are one call: ``plot_training(read_history("outputs/run"), "outputs/run")``.
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grape_hf.reports.plots import KINDS, History, alignment_table, plot_alignment, plot_curves, values_to_draw

_SHARE = 0.01


def plot_training(history: History, folder: str | Path, name: str = "this run") -> list[Path]:
    """Write ``curves.png`` and, where there is feedback, ``alignment.png``: the pictures that a model card shows.

    Args:
        history: the Trainer's log.
        folder: where to.
        name: of the run, in the legend.

    Returns:
        The files written; none before there is something to draw.
    """
    folder = Path(folder)
    values = values_to_draw({name: history})
    written = [plot_curves({name: history}, folder / "curves.png", values)] if values else []
    # Without estimates the exact alignment may have been measured.
    if kind := next((kind for kind in KINDS if alignment_table(history, kind)[1]), None):
        written.append(plot_alignment(history, folder / "alignment.png", kind))
    return written


class PlotCallback(TrainerCallback):
    """Draw a run into its output folder: at each checkpoint and push, at the end, and between for 1 % of the time.

    Only the main process draws.
    """

    def __init__(self) -> None:
        self._drawn_at, self._took = float("-inf"), 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw if a checkpoint is about to be saved, or if the last drawing is long enough ago."""
        if control.should_save or time.monotonic() - self._drawn_at > self._took / _SHARE:
            self._draw(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw, for checkpoints that fall between two entries of the log."""
        self._draw(args, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what is about to be uploaded."""
        self._draw(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        begun = time.monotonic()
        plot_training(state.log_history, str(args.output_dir), Path(str(args.output_dir)).name)
        self._drawn_at = time.monotonic()
        self._took = self._drawn_at - begun
