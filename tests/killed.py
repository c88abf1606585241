"""Not a test: processes that are killed by SIGKILL while they save, for test_checkpoints.py and test_resume.py.

    python tests/killed.py runs FOLDER     < {"name": {option: value}, ...}
    python tests/killed.py moments FOLDER

``runs`` trains each run in a process of its own, in FOLDER/name, which is killed in the middle of its save at step 30.
``moments`` trains one run in FOLDER/whole up to its save at step 30. From there it branches into processes, each with
a copy of the folder, FOLDER/1, FOLDER/2 ...; the n-th is killed when, in its save, a file or folder is opened, renamed
or deleted for the n-th time; the last one is not killed. There is an older checkpoint-30 to be written over, a copy of
checkpoint-20. Prints one exit status a line.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import LEARNED, make_trainer
from problems import DROPOUT

from grape_hf import GrapeTrainer

KILLED_AT = 30
RUN = dict(samples=24, max_steps=40, save_strategy="steps", save_steps=10)
_TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def branch(act: Callable[[], None]) -> int:
    """Run in a new process; return its exit status, which is minus the number of the signal that killed it."""
    sys.stdout.flush()
    state = random.getstate()  # a fork seeds it anew
    if (pid := os.fork()) == 0:
        random.setstate(state)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class KilledInSave(GrapeTrainer):
    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == KILLED_AT:  # weights, optimizer and feedback are written
            kill()
        super()._save_rng_state(output_dir)


class KilledAtEachMoment(GrapeTrainer):
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < KILLED_AT:
            return super()._save_checkpoint(*args, **kwargs)
        whole = Path(self.args.output_dir)
        shutil.copytree(whole / "checkpoint-20", whole / "checkpoint-30")
        for moment in range(1, 1000):
            self.args.output_dir = str(whole.parent / str(moment))
            shutil.copytree(whole, self.args.output_dir)
            status = branch(lambda: self._killed(moment, *args))  # noqa: B023  it ends within this turn
            print(status)
            if status == 0:
                break
        sys.exit()

    def _killed(self, moment: int, *args: Any) -> None:
        touched = 0

        def count(event: str, details: tuple[Any, ...]) -> None:
            nonlocal touched
            if event in _TOUCHES and self.args.output_dir in str(details[0]):
                touched += 1
                if touched == moment:
                    kill()

        sys.addaudithook(count)
        super()._save_checkpoint(*args)


def main(mode: str, folder: Path) -> None:
    if mode == "runs":
        for name, options in json.load(sys.stdin).items():
            trainer = make_trainer(DROPOUT, folder / name, KilledInSave, **RUN | options)
            print(branch(trainer.train))
    else:
        make_trainer(DROPOUT, folder / "whole", KilledAtEachMoment, save_total_limit=1, **RUN | LEARNED).train()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
