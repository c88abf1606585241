"""Checkpoints that are complete or not there, and the look-up of the one to resume from.

The Trainer writes ``trainer_state.json`` as the last file of a checkpoint. Here that file is the mark of a complete
one: it is taken away before a checkpoint is written over, and it appears in one piece (an atomic rename) when every
other file has reached the disk, and before older checkpoints are deleted. So a run that is killed at any moment has
its last complete checkpoint. No file is added that a stock Trainer does not know, and a save that was cut short under
a stock Trainer is told apart by the same mark. While a save is under way its folder has the file by which transformers
marks those made on SIGTERM: a folder that still has it may be deleted, and one without, such as weights alone, not.

What GrAPE itself keeps in a checkpoint (``state.py``) has a list of the files with tensors and their sizes besides, by
which a copy that lost a file is found out.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grape_hf.engine import state
from grape_hf.engine.run import GrapeRun
from grape_hf.engine.state import FEEDBACK_NAME, STATE_NAME
from grape_hf.presets import BASELINES
from grape_hf.training_args import GrapeArgumentsMixin

if TYPE_CHECKING:
    from transformers import Trainer as _Base  # a mixin's methods may call what the Trainer beside it has
else:
    _Base = object

logger = logging.getLogger(__name__)

# transformers writes it into a checkpoint made on SIGTERM, and takes it away afterwards (trainer_jit_checkpoint.py); so
# do we in all.
_JIT_SENTINEL = "checkpoint-is-incomplete.txt"
_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")


class CheckpointMixin(_Base):
    """Checkpoints of a Trainer, with the feedback in them; ``GrapeMixin`` has it."""

    grape_options: GrapeArgumentsMixin

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_from: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; with ``resume_from_checkpoint=True`` from the last complete checkpoint (``checkpoints.py``)."""
        return super().train(checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        discard = bool(self.args.save_total_limit)
        own = self._resumed_from is not None and self._resumed_from.resolve() == folder.resolve()
        others = () if own else (FEEDBACK_NAME, STATE_NAME)  # of an earlier run in the same folder
        with complete_save(folder, self.state, discard, others) if self.args.should_save else nullcontext():
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last file of every rank but the first: then the first may declare the checkpoint complete.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save or self.grape_options.method in ("bp", *BASELINES):
            return
        if self._run is not None and self.feedback:  # also behind the end of a training, as after an interrupt
            state.save(self._run, Path(output_dir), self.state.global_step != self._run.current_step)
        elif self._resumed_from is not None and self._resumed_from.resolve() != Path(output_dir).resolve():
            # On SIGTERM, before the first step: what the run resumed from is what it has.
            for name in (FEEDBACK_NAME, STATE_NAME):
                if (self._resumed_from / name).exists():
                    shutil.copy(self._resumed_from / name, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The matrices are read when their shapes are known, at the first step.
        self._resumed_from = None if checkpoint is None else Path(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # B_l belongs to the weights beside which it was learned. With save_only_model there is none in a checkpoint.
        folder = Path(self.state.best_model_checkpoint or "")
        if self._run is not None and self._run.started and (folder / FEEDBACK_NAME).exists():
            state.load_feedback(self._run, folder)

    def _resume(self, run: GrapeRun) -> None:
        """Read what the checkpoint says that this training resumes from."""
        if self._resumed_from is None:
            return
        if any((self._resumed_from / name).exists() for name in (FEEDBACK_NAME, STATE_NAME)):
            state.load(run, self._resumed_from)
        else:
            logger.warning(
                f"GrAPE: no feedback matrices in {self._resumed_from}, which is of a stock Trainer, of another method "
                "or holds the model only. B_l and the calibration schedule start afresh."
            )


@contextmanager
def complete_save(
    folder: Path, state: TrainerState, discard: bool = False, others: Collection[str] = ()
) -> Iterator[None]:
    """Enclose the writing of one checkpoint, of which ``state.save_to_json`` writes the last file.

    Args:
        folder: the checkpoint.
        state: the Trainer's state.
        discard: delete the leftovers of interrupted saves beside it as soon as this one is complete, so that a
            rotation does not count them as checkpoints.
        others: names of files of an earlier checkpoint in that folder that this one may lack.
    """

    def save_to_json(path: str) -> None:
        if Path(path).resolve().parent != folder.resolve():  # ``save_state`` of a user's own, somewhere else
            TrainerState.save_to_json(state, path)
            return
        _list_files(folder)
        for file in folder.rglob("*"):
            _sync(file)
        part = Path(f"{path}.part")
        TrainerState.save_to_json(state, str(part))
        _sync(part)
        (folder / _JIT_SENTINEL).unlink(missing_ok=True)
        os.replace(part, path)
        _sync(folder)
        _sync(folder.parent)
        if discard:
            for other in filter(_interrupted, _numbered(folder.parent)):
                logger.warning(f"GrAPE: deleting {other}, which an interrupted save left behind.")
                shutil.rmtree(other, ignore_errors=True)

    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _JIT_SENTINEL).write_text("A save is under way, or was interrupted.", encoding="utf-8")
    for name in others:
        (folder / name).unlink(missing_ok=True)
    state.save_to_json = save_to_json
    try:
        yield
    finally:
        del state.save_to_json


def faults(folder: Path) -> list[str]:
    """Say what is missing in a checkpoint; nothing if it is complete."""
    if not folder.is_dir():
        return ["there is no such folder"]
    found = []
    if not _is_json(folder / TRAINER_STATE_NAME):
        found.append(f"{TRAINER_STATE_NAME}, the last file of a save, is missing or cut off")
    if (folder / _JIT_SENTINEL).exists():
        found.append(f"{_JIT_SENTINEL} is still there")
    try:
        listed = json.loads((folder / STATE_NAME).read_text()).get("files", {})
    except FileNotFoundError:  # a stock Trainer's, or one with the model only
        listed = {}
        if (folder / FEEDBACK_NAME).exists():
            found.append(f"{STATE_NAME} is missing")
    except (ValueError, AttributeError):
        return [*found, f"{STATE_NAME} is cut off"]
    for name, size in listed.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != size:
            found.append(f"{name} has {file.stat().st_size:,} bytes of {size:,}")
    return found


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete ``checkpoint-<step>`` in ``folder``, None if there is none.

    What is newer and not complete is skipped, with a warning that says what is missing.
    """
    for checkpoint in _numbered(Path(folder)):
        if not (missing := faults(checkpoint)):
            return str(checkpoint)
        logger.warning(f"GrAPE: not resuming from {checkpoint}, which is incomplete: {'; '.join(missing)}.")
    return None


def checkpoint_to_resume(resume: str | Path | bool | None, output_dir: str) -> str | None:
    """Return the folder that ``train(resume_from_checkpoint=resume)`` means, after looking whether it is complete.

    Args:
        resume: a folder; True, also as a word, as the command line has it, for the last complete one in
            ``output_dir``; None or False for none.
        output_dir: of the run.

    Raises:
        ValueError: if the folder is incomplete, or there is no complete one in ``output_dir``. The messages begin with
            the stock Trainer's words, which scripts may look for.
    """
    if not resume:
        return None
    if resume is True or (str(resume).lower() == "true" and not Path(resume).exists()):
        last = last_checkpoint(output_dir)
        if last is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}): expected a complete folder "
                f"{PREFIX_CHECKPOINT_DIR}-<step>. Leave out resume_from_checkpoint to start afresh, or name a folder."
            )
        logger.info(f"GrAPE: resuming from {last}.")
        return last
    folder = Path(resume)
    if missing := faults(folder):
        other = last_checkpoint(folder.parent)
        raise ValueError(
            f"Can't find a valid checkpoint at {folder}, it is incomplete: {'; '.join(missing)}. "
            + (f"The last complete one beside it is {other}." if other else "There is no complete one beside it.")
        )
    return str(resume)


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, complete or not, newest first."""
    steps = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            steps[path] = int(match[1])
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _interrupted(folder: Path) -> bool:
    return (folder / _JIT_SENTINEL).exists()


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _list_files(folder: Path) -> None:
    """Note in GrAPE's own state, where there is one, which files with tensors the checkpoint has."""
    file = folder / STATE_NAME
    if not file.exists():
        return
    state: dict[str, Any] = json.loads(file.read_text())
    tensors = sorted(f for f in folder.rglob("*") if f.suffix in _TENSORS)
    state["files"] = {f.relative_to(folder).as_posix(): f.stat().st_size for f in tensors}
    file.write_text(json.dumps(state, indent=2))


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; where a file system does not know how, its word has to do."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
