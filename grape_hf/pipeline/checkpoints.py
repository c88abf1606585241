"""Checkpoints of a pipeline are those of one process: one folder, which any number of stages resumes from.

The main process gathers what the stages have and writes it as the stock Trainer would. On loading each stage takes its
own part. What differs between stages is the state of the random number generators: those of stages above the first lie
in folders of their own, and are found again at the same number of stages.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grape_hf.core.finite import FiniteGuard
from grape_hf.engine.calibration import CalibrationSchedule
from grape_hf.engine.drift import DriftGuard
from grape_hf.engine.state import FEEDBACK_NAME, STATE_NAME
from grape_hf.pipeline.feedback import StageFeedback
from grape_hf.pipeline.places import Places
from grape_hf.pipeline.split import StageModel

logger = logging.getLogger(__name__)


def whole_state_dict(split: StageModel, places: Places) -> dict[str, Tensor] | None:
    """Return the whole model's weights on the main process, on the CPU; None on the others.

    Tied weights are one tensor under all of their names, as they are in one process.
    """
    own = {name: value.detach().cpu() for name, value in split.model.state_dict().items()}
    if places.stage and split.tied:
        # The first stage has them as well.
        tied = {value.data_ptr() for value in split.tied}
        own = {
            name: value
            for name, value in own.items()
            if split.model.state_dict(keep_vars=True)[name].data_ptr() not in tied
        }
    parts = places.gathered(own)
    if parts is None:
        return None
    found = {name: value for part in reversed(parts) for name, value in part.items()}
    return {name: found[next(n for n in names if n in found)] for names in split.state_names for name in names}


class OptimizerStates:
    """An optimiser's state as one process would have it, and back.

    One process numbers the parameters by group, and within a group in the order of the model.

    Args:
        model: this stage's.
        split: this stage of the model.
        places: of this process.
        optimizer: of this stage's parameters.
    """

    def __init__(self, model: nn.Module, split: StageModel, places: Places, optimizer: Any) -> None:
        self._places, self._optimizer = places, optimizer
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        of_stages = places.together(self._own)
        groups = range(len(self._own))
        members = [{name for stage in of_stages for name in stage[group]} for group in groups]
        order = [[name for name in split.names if name in members[group]] for group in groups]
        numbers = iter(range(sum(map(len, order))))
        self._numbers = [{name: next(numbers) for name in group} for group in order]

    def whole(self) -> dict[str, Any] | None:
        """Return the state of all parameters on the main process, None on the others."""
        own = self._optimizer.state_dict()
        by_name = {
            name: own["state"][number]
            for group, names in zip(own["param_groups"], self._own, strict=True)
            for number, name in zip(group["params"], names, strict=True)
            if number in own["state"]
        }
        parts = self._places.gathered((by_name, own["param_groups"]))
        if parts is None:
            return None
        state = {name: value for states, _ in reversed(parts) for name, value in states.items()}
        numbered = {number: state[n] for group in self._numbers for n, number in group.items() if n in state}
        groups = [
            {**settings, "params": list(numbers.values())}
            for settings, numbers in zip(parts[0][1], self._numbers, strict=True)
        ]
        return {"state": numbered, "param_groups": groups}

    def own_part(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """Return this stage's part of a state of all parameters.

        Raises:
            ValueError: if the state is of other parameters.
        """
        found = [len(group["params"]) for group in whole["param_groups"]]
        expected = [len(group) for group in self._numbers]
        if found != expected:
            raise ValueError(
                f"the optimiser's state is of another model: expected groups of {expected} parameters, found {found}. "
                "Resume with the model and the optimiser of the run that wrote the checkpoint."
            )
        own = self._optimizer.state_dict()
        state, groups = {}, []
        for saved, settings, numbers, names in zip(
            whole["param_groups"], own["param_groups"], self._numbers, self._own, strict=True
        ):
            place = dict(zip(numbers, saved["params"], strict=True))  # a stock checkpoint may number otherwise
            for number, name in zip(settings["params"], names, strict=True):
                if place[name] in whole["state"]:
                    state[number] = whole["state"][place[name]]
            groups.append({**saved, "params": settings["params"]})
        return {"state": state, "param_groups": groups}


def save_feedback(
    folder: Path, feedback: StageFeedback | None, calibration: CalibrationSchedule, places: Places
) -> None:
    """Write B_l and the calibration schedule into a checkpoint, as one process would; to be called by all.

    Args:
        folder: the checkpoint.
        feedback: of this stage; None for backpropagation, which has none.
        calibration: the schedule.
        places: of this process.
    """
    if feedback is None:
        return
    read_at, settled = places.from_last((feedback.read_at, feedback.settled))
    feedback.save(folder / FEEDBACK_NAME, places)
    if places.is_first and places.replica == 0:
        state = {
            "schedule": calibration.state_dict(),
            "jvp_mode": None,
            "read_at": read_at,
            "read_at_settled": settled,
            "skipped": FiniteGuard().state_dict(),
            "drift": DriftGuard("no", 0.0, 1, []).state_dict(),
        }
        (folder / STATE_NAME).write_text(json.dumps(state, indent=2))


def load_feedback(folder: Path, feedback: StageFeedback | None, calibration: CalibrationSchedule) -> None:
    """Read them back, if the checkpoint has them.

    Args:
        folder: the checkpoint.
        feedback: as above.
        calibration: as above.
    """
    if feedback is None:
        return
    if not (folder / FEEDBACK_NAME).exists():
        logger.warning(
            f"GrAPE: no feedback matrices in {folder}, which is of a stock Trainer or of another method. B_l and "
            "the calibration schedule start afresh."
        )
        return
    state = json.loads((folder / STATE_NAME).read_text())
    feedback.load(folder / FEEDBACK_NAME, state["read_at"], state.get("read_at_settled", False))
    calibration.load_state_dict(state["schedule"])


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have an object answer otherwise for a while: the Trainer asks its optimiser itself."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def random_state_folder(folder: str, places: Places) -> str:
    """Return where a stage's random number generators are kept: the first stage's where one process keeps its own."""
    return folder if places.is_first else str(Path(folder) / f"pipeline-stage-{places.stage}-of-{places.stages}")


def seed_stage(seed: int, stage: int) -> None:
    """Give a stage random numbers of its own, for dropout; the first has those of one process.

    The first one's also order the data, for all.
    """
    if stage:
        torch.manual_seed(seed + 1_000_003 * stage)
