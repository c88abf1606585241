"""What a run keeps on disk beside the Trainer's checkpoint: B_l, the maps, and what else a resumed run has to know."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from grape_hf.engine.run import GrapeRun

FEEDBACK_NAME = "grape_feedback.safetensors"
STATE_NAME = "grape_state.json"

State = tuple[dict[str, Tensor], dict[str, Any]]


def state_of(run: "GrapeRun") -> State:
    """Return the matrices by their names, and the rest; random draws are functions of seed and step."""
    return run.feedback.tensors(), {
        "schedule": run.schedule.state_dict(),
        "jvp_mode": run.jvp_mode,
        "read_at": run.boundaries.read_at,
        "read_at_settled": run.first_error.taken,
        "skipped": run.feedback.guard.state_dict(),
        "drift": run.drift.state_dict(),
    }


def save(run: "GrapeRun", folder: Path, finished: bool = True) -> None:
    """Write the state to ``folder``.

    Args:
        run: the run.
        folder: the checkpoint.
        finished: False between ``finish_step`` and the update of the weights: a resumed run will do the whole step
            again, so with ``restartable`` what it started from is written.
    """
    tensors, rest = run.began_with if run.restartable and not finished else state_of(run)
    run.feedback.save(folder / FEEDBACK_NAME, run.block_names, tensors)
    (folder / STATE_NAME).write_text(json.dumps(rest, indent=2, default=Tensor.tolist))


def load(run: "GrapeRun", folder: Path) -> None:
    """Read the state back; see ``Feedback.load`` for what is refused.

    Raises:
        ValueError: if the state cannot be read.
    """
    load_feedback(run, folder)
    path = folder / STATE_NAME
    try:
        state = json.loads(path.read_text())
        run.schedule.load_state_dict(state["schedule"])
        if run.options.jvp_mode == "auto":  # it may have found out that dual numbers do not work
            run.estimates.mode = state["jvp_mode"] or run.estimates.mode  # stages make no estimates
        run.feedback.guard.load_state_dict(state["skipped"], run.feedback.B[0].device)
        run.drift.load_state_dict(state["drift"])
        # Not by the first batch of this process; an older checkpoint does not tell of "everywhere".
        if state.get("read_at_settled", state["read_at"] is not None):
            run.boundaries.read_at = state["read_at"]
            run.first_error.seen = run.first_error.taken = True
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot read the state of the calibration schedule in {path}: {error!r}. The checkpoint is "
            "incomplete: resume from another one that GrapeTrainer wrote."
        ) from error


def load_feedback(run: "GrapeRun", folder: Path) -> None:
    """Read the matrices alone."""
    run.feedback.load(folder / FEEDBACK_NAME, run.block_names)
    run.feedback.put(run.ranks.first(run.feedback.learned))  # each rank has read a file of its own
    run.note_start()
